// Stands between the library and ONNX Runtime: times the runs of the network, and counts what is allocated between them
// on the thread that samples. Given as DIFFX_ONNXRUNTIME_LIBRARY it wraps the library that RAW_RUNS_LIBRARY names;
// loaded before the program (LD_PRELOAD) it sees every allocation. What it found is written to stderr when the program
// ends.
#include <dlfcn.h>
#include <onnxruntime_c_api.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>

namespace {

using Clock = std::chrono::steady_clock;

constexpr unsigned long kWarmUp = 20; // runs that are left out

thread_local bool between = false;       // this thread has run the network and is not in it now
thread_local unsigned long pending = 0;  // allocations since the last run
unsigned long runs = 0, allocations = 0; // of those that another run followed
double seconds_of_runs = 0, seconds_in_all = 0;
Clock::time_point begun;

decltype(OrtApi::RunWithBinding) real_run = nullptr;

OrtStatus* ORT_API_CALL timed_run(OrtSession* session, const OrtRunOptions* options,
                                  const OrtIoBinding* binding) noexcept {
    between = false;
    allocations += pending;
    const auto started = Clock::now();
    OrtStatus* status = real_run(session, options, binding);
    const auto ended = Clock::now();
    if (++runs <= kWarmUp) {
        begun = ended;
        allocations = 0;
    } else {
        seconds_of_runs += std::chrono::duration<double>(ended - started).count();
        seconds_in_all = std::chrono::duration<double>(ended - begun).count();
    }
    pending = 0;
    between = true;
    return status;
}

const OrtApi* ORT_API_CALL patched_api(uint32_t version) noexcept {
    static OrtApi api;
    void* library = dlopen(std::getenv("RAW_RUNS_LIBRARY"), RTLD_NOW);
    const auto base = reinterpret_cast<const OrtApiBase* (*)()>(dlsym(library, "OrtGetApiBase"));
    api = *base()->GetApi(version);
    real_run = api.RunWithBinding;
    api.RunWithBinding = timed_run;
    return &api;
}

struct Report {
    ~Report() {
        if (runs != 0)
            std::fprintf(stderr, "runs %lu seconds_of_runs %.9f seconds_in_all %.9f allocations %lu\n", runs - kWarmUp,
                         seconds_of_runs, seconds_in_all, allocations);
    }
} report;

} // namespace

extern "C" {

ORT_EXPORT const OrtApiBase* ORT_API_CALL OrtGetApiBase(void) noexcept {
    static const OrtApiBase base{patched_api, []() noexcept { return "raw runs"; }};
    return &base;
}

void* __libc_malloc(std::size_t size);

void* malloc(std::size_t size) noexcept {
    if (between) ++pending;
    return __libc_malloc(size);
}
}
