#include "backend.hpp"

#include <sched.h>

#include <algorithm>
#include <thread>

#include "backends/open.hpp"
#include "error.hpp"

namespace diffx::core {
namespace {

struct Entry {
    const char* name;
    const char* component; // the CMake option that builds it in
    std::shared_ptr<Network> (*open)(const Bundle&, const Options&);
    bool compiles; // for a GPU
};

constexpr Entry kBackends[] = {
    {"ort", "DIFFX_ONNXRUNTIME", DIFFX_ONNXRUNTIME ? open_onnxruntime : nullptr, false},
    {"ort-cuda", "DIFFX_ONNXRUNTIME", DIFFX_ONNXRUNTIME ? open_onnxruntime_cuda : nullptr, true},
    {"openvino", "DIFFX_OPENVINO", DIFFX_OPENVINO ? open_openvino : nullptr, false},
    {"trt", "DIFFX_TENSORRT", DIFFX_TENSORRT ? open_tensorrt : nullptr, true},
    {"trt-rtx", "DIFFX_TENSORRT", DIFFX_TENSORRT ? open_tensorrt_rtx : nullptr, true},
};

} // namespace

std::shared_ptr<Network> open_network(const Bundle& bundle, const std::string& backend, const Options& options) {
    std::string known;
    for (const Entry& entry : kBackends) {
        known.append(known.empty() ? "" : ", ").append(entry.name);
        if (backend != entry.name) continue;
        if (entry.open == nullptr)
            throw error(DIFFX_BACKEND_ERROR, "backend '", backend,
                        "': this library was built without it; build again with -D", entry.component, "=ON");
        return entry.open(bundle, options);
    }
    throw error(DIFFX_BACKEND_ERROR, "backend '", backend, "': there is none of this name; known: ", known);
}

bool compiles(const std::string& backend) {
    const auto* found = std::ranges::find(kBackends, backend, &Entry::name);
    return found != std::end(kBackends) && found->compiles;
}

const char* backend_names() {
    static const std::string names = [] {
        std::string text;
        for (const Entry& entry : kBackends)
            if (entry.open != nullptr) text.append(text.empty() ? "" : " ").append(entry.name);
        return text;
    }();
    return names.c_str();
}

int thread_count(const Options& options) {
    if (options.threads > 0) return options.threads;
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) return CPU_COUNT(&allowed);
    return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
}

} // namespace diffx::core
