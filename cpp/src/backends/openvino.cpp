// OpenVINO on the CPU, through its C API, with the settings of diffexport/backends/openvino.py. A request holds the
// buffers of a state for one graph and direction, set once.
#include <openvino/c/openvino.h>

#include <mutex>

#include "backends/buffers.hpp"
#include "backends/library.hpp"
#include "backends/open.hpp"
#include "error.hpp"

namespace diffx::core {
namespace {

constexpr const char* kDevice = "CPU";

/// The functions of the runtime that are used, looked up once.
class OpenVino {
public:
    template <typename Function>
    using Pointer = std::add_pointer_t<Function>;

#define DIFFX_OPENVINO_FUNCTION(name)                                                                                  \
    Pointer<decltype(ov_##name)> name = library_.symbol<decltype(ov_##name)>("ov_" #name)
private:
    Library library_{"openvino", "DIFFX_OPENVINO_LIBRARY", DIFFX_OPENVINO_LIBRARY, "install OpenVINO"};

public:
    DIFFX_OPENVINO_FUNCTION(core_create);
    DIFFX_OPENVINO_FUNCTION(core_free);
    DIFFX_OPENVINO_FUNCTION(core_get_property);
    DIFFX_OPENVINO_FUNCTION(core_compile_model_from_file);
    DIFFX_OPENVINO_FUNCTION(compiled_model_create_infer_request);
    DIFFX_OPENVINO_FUNCTION(compiled_model_free);
    DIFFX_OPENVINO_FUNCTION(infer_request_set_tensor);
    DIFFX_OPENVINO_FUNCTION(infer_request_infer);
    DIFFX_OPENVINO_FUNCTION(infer_request_free);
    DIFFX_OPENVINO_FUNCTION(tensor_create_from_host_ptr);
    DIFFX_OPENVINO_FUNCTION(tensor_free);
    DIFFX_OPENVINO_FUNCTION(get_last_err_msg);
    DIFFX_OPENVINO_FUNCTION(get_error_info);
    DIFFX_OPENVINO_FUNCTION(free);
#undef DIFFX_OPENVINO_FUNCTION

    void check(ov_status_e status, const std::string& what) const {
        if (status == OK) return;
        std::string reason = get_error_info(status);
        if (const char* message = get_last_err_msg(); message != nullptr) {
            std::string lines = message; // the last line says what; those before it, where in the runtime's sources
            lines.erase(lines.find_last_not_of(" \n") + 1);
            if (!lines.empty()) reason = lines.substr(lines.find_last_of('\n') + 1);
            free(message);
        }
        throw error(DIFFX_BACKEND_ERROR, what, ": OpenVINO says ", reason);
    }
};

/// An object of the runtime, freed by one of its functions.
template <typename Object>
using Owned = std::unique_ptr<Object, void (*)(Object*)>;

class OpenVinoNetwork final : public Network, public std::enable_shared_from_this<OpenVinoNetwork> {
public:
    OpenVinoNetwork(const Bundle& bundle, const Options& options)
        : manifest(bundle.manifest()), core_(nullptr, ov.core_free), folder_(bundle.path()), options_(options) {
        ov_core_t* core = nullptr;
        ov.check(ov.core_create(&core), "backend 'openvino'");
        core_.reset(core);
        bf16_ = manifest.precision == "bf16" && property("OPTIMIZATION_CAPABILITIES").find("BF16") != std::string::npos;
    }

    std::string device() const override { return property("FULL_DEVICE_NAME"); }
    std::size_t max_batch() const override { return 0; }
    std::unique_ptr<State> state(std::size_t batch) override;
    void decode(std::span<const float> latents, std::array<std::int64_t, 2> sides, std::span<float> image) override;

    Owned<ov_infer_request_t> request(std::size_t which) {
        const auto& compiled = graphs_.get(which, [this](std::size_t graph) { return load(graph); });
        ov_infer_request_t* made = nullptr;
        ov.check(ov.compiled_model_create_infer_request(compiled.get(), &made), kGraphs[which]);
        return {made, ov.infer_request_free};
    }

    /// Let a request read or write numbers on the host.
    void set(ov_infer_request_t* request, const char* name, void* data, std::span<const std::int64_t> shape,
             bool integers) const {
        const ov_shape_t sides{static_cast<std::int64_t>(shape.size()), const_cast<std::int64_t*>(shape.data())};
        ov_tensor_t* made = nullptr;
        ov.check(ov.tensor_create_from_host_ptr(integers ? I64 : F32, sides, data, &made), name);
        const Owned<ov_tensor_t> tensor{made, ov.tensor_free};
        ov.check(ov.infer_request_set_tensor(request, name, tensor.get()), name);
    }

    const OpenVino ov;
    const Manifest manifest;

private:
    std::unique_ptr<Owned<ov_compiled_model_t>> load(std::size_t which) const {
        const std::string path = (folder_ / (std::string(kGraphs[which]) + ".onnx")).string();
        const std::string threads = std::to_string(thread_count(options_));
        ov_compiled_model_t* compiled = nullptr;
        ov.check(ov.core_compile_model_from_file(core_.get(), path.c_str(), kDevice, 6, &compiled,
                                                 "INFERENCE_PRECISION_HINT", bf16_ ? "bf16" : "f32",
                                                 "INFERENCE_NUM_THREADS", threads.c_str(), "NUM_STREAMS", "1"),
                 path);
        return std::make_unique<Owned<ov_compiled_model_t>>(compiled, ov.compiled_model_free);
    }

    std::string property(const char* name) const {
        char* value = nullptr;
        ov.check(ov.core_get_property(core_.get(), kDevice, name, &value), name);
        std::string text = value;
        ov.free(value);
        return text.substr(0, text.find_last_not_of(' ') + 1);
    }

    Owned<ov_core_t> core_;
    std::filesystem::path folder_;
    Options options_;
    bool bf16_ = false;
    Graphs<Owned<ov_compiled_model_t>> graphs_;
};

class OpenVinoState final : public BufferedState {
public:
    OpenVinoState(std::shared_ptr<OpenVinoNetwork> network, std::size_t batch)
        : BufferedState(host_memory(), network->manifest, batch), network_(std::move(network)) {}

private:
    void run(std::size_t graph, bool back) override {
        if (requests_[graph].empty())
            for (const bool direction : {false, true}) requests_[graph].push_back(prepare(graph, direction));
        network_->ov.check(network_->ov.infer_request_infer(requests_[graph][back].get()), kGraphs[graph]);
    }

    Owned<ov_infer_request_t> prepare(std::size_t graph, bool back) {
        auto request = network_->request(graph);
        for (const char* name : {"x", "h", "z", "row", "label", "x_next", "h_next"})
            if (const std::size_t found = place(name, back); found < slots().size()) {
                const Slot& slot = slots()[found];
                network_->set(request.get(), name, slot.buffer->data(), slot.shape, slot.integers);
            }
        return request;
    }

    std::shared_ptr<OpenVinoNetwork> network_;
    std::vector<Owned<ov_infer_request_t>> requests_[2];
};

std::unique_ptr<State> OpenVinoNetwork::state(std::size_t batch) {
    return std::make_unique<OpenVinoState>(shared_from_this(), batch);
}

void OpenVinoNetwork::decode(std::span<const float> latents, std::array<std::int64_t, 2> sides,
                             std::span<float> image) {
    const auto upscale = manifest.image_shape[1] / manifest.shape[1];
    const std::int64_t from[] = {1, manifest.shape[0], sides[0], sides[1]};
    const std::int64_t to[] = {1, manifest.image_shape[0], sides[0] * upscale, sides[1] * upscale};
    const auto decoder = request(kDecoder);
    set(decoder.get(), "x", const_cast<float*>(latents.data()), from, false);
    set(decoder.get(), "image", image.data(), to, false);
    ov.check(ov.infer_request_infer(decoder.get()), "decoder");
}

} // namespace

std::shared_ptr<Network> open_openvino(const Bundle& bundle, const Options& options) {
    return std::make_shared<OpenVinoNetwork>(bundle, options);
}

} // namespace diffx::core
