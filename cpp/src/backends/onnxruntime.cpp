// ONNX Runtime, through its C API. The buffers of a state are bound once for each graph and direction, so that a step
// allocates nothing.
#include <onnxruntime_c_api.h>

#include <utility>

#include "backends/buffers.hpp"
#include "backends/library.hpp"
#include "backends/open.hpp"
#include "error.hpp"

namespace diffx::core {
namespace {

/// The runtime: its table of functions, and what each of them returns turned into an error.
class Ort {
public:
    Ort()
        : library_("ort", "DIFFX_ONNXRUNTIME_LIBRARY", DIFFX_ONNXRUNTIME_LIBRARY, "install ONNX Runtime's C library") {
        const OrtApiBase* base = library_.symbol<const OrtApiBase*()>("OrtGetApiBase")();
        api = base->GetApi(ORT_API_VERSION);
        if (api == nullptr)
            throw error(DIFFX_BACKEND_ERROR, "backend 'ort': ", library_.name(), " is version ",
                        base->GetVersionString(), ", expected 1.", ORT_API_VERSION, " or later");
    }

    void check(OrtStatus* status, std::string_view what) const {
        if (status == nullptr) return;
        const std::string message = api->GetErrorMessage(status);
        api->ReleaseStatus(status);
        throw error(DIFFX_BACKEND_ERROR, what, ": ONNX Runtime says ", message.substr(0, message.find('\n')));
    }

    const OrtApi* api;

private:
    Library library_;
};

/// An object of the runtime, released by one of its functions.
template <typename Object>
class Handle {
public:
    using Release = void(ORT_API_CALL*)(Object*);
    explicit Handle(Release release) : release_(release) {}
    Handle(Handle&& other) noexcept : object_(std::exchange(other.object_, nullptr)), release_(other.release_) {}
    Handle& operator=(Handle&&) = delete;
    ~Handle() {
        if (object_ != nullptr) release_(object_);
    }
    Object** out() { return &object_; }
    Object* get() const { return object_; }

private:
    Object* object_ = nullptr;
    Release release_;
};

class OrtNetwork final : public Network, public std::enable_shared_from_this<OrtNetwork> {
public:
    OrtNetwork(const Bundle& bundle, const Options& options, bool cuda)
        : environment_(ort.api->ReleaseEnv), folder_(bundle.path()), options_(options), cuda_(cuda),
          manifest(bundle.manifest()) {
        ort.check(ort.api->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "diffx", environment_.out()), "backend 'ort'");
    }

    std::string device() const override { return cuda_ ? "CUDA device " + std::to_string(options_.device) : "CPU"; }
    std::size_t max_batch() const override { return 0; }
    std::unique_ptr<State> state(std::size_t batch) override;
    void decode(std::span<const float> latents, std::array<std::int64_t, 2> sides, std::span<float> image) override;

    OrtSession* session(std::size_t which) {
        return graphs_.get(which, [this](std::size_t graph) { return load(graph); }).get();
    }
    std::unique_ptr<Memory> memory() const {
        if (cuda_) return cuda_memory(options_.device);
        return host_memory();
    }

    /// A tensor over numbers that lie on the host, or on the network's device.
    Handle<OrtValue> tensor(void* data, std::size_t bytes, std::span<const std::int64_t> shape, bool integers,
                            bool host) const {
        const bool cuda = cuda_ && !host;
        Handle<OrtMemoryInfo> info(ort.api->ReleaseMemoryInfo);
        ort.check(ort.api->CreateMemoryInfo(cuda ? "Cuda" : "Cpu", OrtDeviceAllocator, cuda ? options_.device : 0,
                                            OrtMemTypeDefault, info.out()),
                  "tensor");
        Handle<OrtValue> value(ort.api->ReleaseValue);
        const auto type = integers ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
        ort.check(ort.api->CreateTensorWithDataAsOrtValue(info.get(), data, bytes, shape.data(), shape.size(), type,
                                                          value.out()),
                  "tensor");
        return value;
    }

    const Ort ort;

private:
    std::unique_ptr<Handle<OrtSession>> load(std::size_t which) const {
        const std::string path = (folder_ / (std::string(kGraphs[which]) + ".onnx")).string();
        Handle<OrtSessionOptions> options(ort.api->ReleaseSessionOptions);
        ort.check(ort.api->CreateSessionOptions(options.out()), path);
        ort.check(ort.api->SetIntraOpNumThreads(options.get(), thread_count(options_)), path);
        ort.check(ort.api->SetSessionLogSeverityLevel(options.get(), ORT_LOGGING_LEVEL_ERROR), path);
        if (cuda_) append_cuda(options.get(), path);
        auto session = std::make_unique<Handle<OrtSession>>(ort.api->ReleaseSession);
        ort.check(ort.api->CreateSession(environment_.get(), path.c_str(), options.get(), session->out()), path);
        return session;
    }

    /// The provider is used or this throws: the runtime reports a provider that it cannot load here.
    void append_cuda(OrtSessionOptions* options, const std::string& path) const {
        Handle<OrtCUDAProviderOptionsV2> cuda(ort.api->ReleaseCUDAProviderOptions);
        ort.check(ort.api->CreateCUDAProviderOptions(cuda.out()), path);
        const std::string device = std::to_string(options_.device);
        const char *const keys[] = {"device_id"}, *const values[] = {device.c_str()};
        ort.check(ort.api->UpdateCUDAProviderOptions(cuda.get(), keys, values, 1), path);
        ort.check(ort.api->SessionOptionsAppendExecutionProvider_CUDA_V2(options, cuda.get()), path);
    }

    Handle<OrtEnv> environment_;
    std::filesystem::path folder_;
    Options options_;
    bool cuda_;
    Graphs<Handle<OrtSession>> graphs_;

public:
    const Manifest manifest;
};

class OrtState final : public BufferedState {
public:
    OrtState(std::shared_ptr<OrtNetwork> network, std::size_t batch)
        : BufferedState(network->memory(), network->manifest, batch), network_(std::move(network)),
          ort_(network_->ort) {
        for (const Slot& slot : slots())
            tensors_.push_back(network_->tensor(slot.buffer->data(), slot.bytes, slot.shape, slot.integers, false));
    }

private:
    void run(std::size_t graph, bool back) override {
        OrtSession* session = network_->session(graph);
        if (bindings_[graph].empty())
            for (const bool direction : {false, true}) bindings_[graph].push_back(bind(session, direction));
        memory().finish(); // a run has a stream of its own, and waits for it at its end
        ort_.check(ort_.api->RunWithBinding(session, nullptr, bindings_[graph][back].get()), kGraphs[graph]);
    }

    Handle<OrtIoBinding> bind(OrtSession* session, bool back) const {
        Handle<OrtIoBinding> binding(ort_.api->ReleaseIoBinding);
        ort_.check(ort_.api->CreateIoBinding(session, binding.out()), "binding");
        for (const char* name : {"x", "h", "z", "row", "label"}) {
            const std::size_t found = place(name, back);
            if (found < tensors_.size())
                ort_.check(ort_.api->BindInput(binding.get(), name, tensors_[found].get()), name);
        }
        for (const char* name : {"x_next", "h_next"})
            ort_.check(ort_.api->BindOutput(binding.get(), name, tensors_[place(name, back)].get()), name);
        return binding;
    }

    std::shared_ptr<OrtNetwork> network_;
    const Ort& ort_;
    std::vector<Handle<OrtValue>> tensors_; // in the order of slots()
    std::vector<Handle<OrtIoBinding>> bindings_[2];
};

std::unique_ptr<State> OrtNetwork::state(std::size_t batch) {
    return std::make_unique<OrtState>(shared_from_this(), batch);
}

void OrtNetwork::decode(std::span<const float> latents, std::array<std::int64_t, 2> sides, std::span<float> image) {
    const auto upscale = manifest.image_shape[1] / manifest.shape[1];
    const std::int64_t from[] = {1, manifest.shape[0], sides[0], sides[1]};
    const std::int64_t to[] = {1, manifest.image_shape[0], sides[0] * upscale, sides[1] * upscale};
    const auto x = tensor(const_cast<float*>(latents.data()), latents.size_bytes(), from, false, true);
    const auto pixels = tensor(image.data(), image.size_bytes(), to, false, true);
    const char *const inputs[] = {"x"}, *const outputs[] = {"image"};
    const OrtValue* const given[] = {x.get()};
    OrtValue* made[] = {pixels.get()};
    ort.check(ort.api->Run(session(kDecoder), nullptr, inputs, given, 1, outputs, 1, made), "decoder");
}

} // namespace

std::shared_ptr<Network> open_onnxruntime(const Bundle& bundle, const Options& options) {
    if (bundle.manifest().precision == "bf16")
        throw error(DIFFX_BACKEND_ERROR,
                    "backend 'ort': ONNX Runtime has no bfloat16 on a CPU; take --backend openvino, or a "
                    "bundle of fp16");
    return std::make_shared<OrtNetwork>(bundle, options, false);
}

std::shared_ptr<Network> open_onnxruntime_cuda(const Bundle& bundle, const Options& options) {
    return std::make_shared<OrtNetwork>(bundle, options, true);
}

} // namespace diffx::core
