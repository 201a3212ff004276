// ONNX Runtime, through its C API. Both step graphs read and write the same buffers, bound once for each direction, so that
// a step allocates and copies nothing but the noise.
#include <onnxruntime_c_api.h>

#include <algorithm>
#include <mutex>
#include <utility>
#include <vector>

#include "backends/library.hpp"
#include "backends/memory.hpp"
#include "backends/open.hpp"
#include "bundle.hpp"
#include "error.hpp"

namespace diffx::core {
namespace {

/// The runtime: its table of functions, and what each of them returns turned into an error.
class Ort {
public:
    Ort() : library_("ort", "DIFFX_ONNXRUNTIME_LIBRARY", DIFFX_ONNXRUNTIME_LIBRARY, "install ONNX Runtime's C library") {
        const OrtApiBase* base = library_.symbol<const OrtApiBase*()>("OrtGetApiBase")();
        api = base->GetApi(ORT_API_VERSION);
        if (api == nullptr)
            throw error(DIFFX_BACKEND_ERROR, "backend 'ort': ", library_.name(), " is version ", base->GetVersionString(),
                        ", expected 1.", ORT_API_VERSION, " or later");
    }

    void check(OrtStatus* status, const std::string& what) const {
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

/// A session of one graph, and the names of its inputs.
struct Graph {
    Handle<OrtSession> session;
    std::vector<std::string> inputs;
};

constexpr std::size_t kPlain = 0, kGuided = 1, kDecoder = 2; // graphs of a bundle

class OrtNetwork final : public Network, public std::enable_shared_from_this<OrtNetwork> {
public:
    OrtNetwork(const Bundle& bundle, const Options& options, bool cuda)
        : environment_(ort.api->ReleaseEnv),
          paths_{bundle.graph("step_plain"), bundle.graph("step"), bundle.graph("decoder")}, options_(options), cuda_(cuda),
          shape_(bundle.manifest().shape), size_(bundle.manifest().size),
          decoder_(bundle.manifest().decoder.value_or(Decoder{})) {
        ort.check(ort.api->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "diffx", environment_.out()), "backend 'ort'");
    }

    std::string device() const override { return cuda_ ? "CUDA device " + std::to_string(options_.device) : "CPU"; }
    std::unique_ptr<State> state(std::size_t batch) override;

    /// A graph, loaded when first asked for.
    const Graph& graph(std::size_t which) {
        const std::lock_guard lock(mutex_);
        if (!graphs_[which]) graphs_[which] = load(paths_[which]);
        return *graphs_[which];
    }

    std::unique_ptr<Memory> memory() const { return cuda_ ? cuda_memory(options_.device) : host_memory(); }
    Handle<OrtMemoryInfo> memory_info() const {
        Handle<OrtMemoryInfo> info(ort.api->ReleaseMemoryInfo);
        ort.check(ort.api->CreateMemoryInfo(cuda_ ? "Cuda" : "Cpu", OrtDeviceAllocator, cuda_ ? options_.device : 0,
                                            OrtMemTypeDefault, info.out()),
                  "backend 'ort'");
        return info;
    }
    std::vector<std::int64_t> batched(std::size_t batch) const {
        std::vector<std::int64_t> shape{static_cast<std::int64_t>(batch)};
        shape.insert(shape.end(), shape_.begin(), shape_.end());
        return shape;
    }
    std::size_t size() const { return size_; }

    void decode(std::span<const float> latents, std::array<std::int64_t, 2> sides, std::span<float> image) override {
        const Graph& graph = this->graph(kDecoder);
        Handle<OrtMemoryInfo> host(ort.api->ReleaseMemoryInfo);
        ort.check(ort.api->CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, host.out()), "decoder");
        const auto wrapped = [&](auto numbers, std::int64_t channels, std::int64_t upscale) {
            const std::int64_t shape[] = {1, channels, sides[0] * upscale, sides[1] * upscale};
            Handle<OrtValue> tensor(ort.api->ReleaseValue);
            ort.check(ort.api->CreateTensorWithDataAsOrtValue(host.get(), const_cast<float*>(numbers.data()), numbers.size_bytes(),
                                                              shape, 4, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, tensor.out()),
                      "decoder");
            return tensor;
        };
        const Handle<OrtValue> x = wrapped(latents, shape_[0], 1);
        const Handle<OrtValue> pixels = wrapped(image, static_cast<std::int64_t>(decoder_.channels), static_cast<std::int64_t>(decoder_.upscale));
        const char *const inputs[] = {"x"}, *const outputs[] = {"image"};
        const OrtValue* const given[] = {x.get()};
        OrtValue* made[] = {pixels.get()};
        ort.check(ort.api->Run(graph.session.get(), nullptr, inputs, given, 1, outputs, 1, made), "decoder");
    }

    const Ort ort;

private:
    std::unique_ptr<Graph> load(const std::string& path) const {
        Handle<OrtSessionOptions> options(ort.api->ReleaseSessionOptions);
        ort.check(ort.api->CreateSessionOptions(options.out()), path);
        ort.check(ort.api->SetIntraOpNumThreads(options.get(), thread_count(options_)), path);
        ort.check(ort.api->SetSessionLogSeverityLevel(options.get(), ORT_LOGGING_LEVEL_ERROR), path);
        if (cuda_) append_cuda(options.get(), path);
        auto graph = std::make_unique<Graph>(Graph{Handle<OrtSession>(ort.api->ReleaseSession), {}});
        ort.check(ort.api->CreateSession(environment_.get(), path.c_str(), options.get(), graph->session.out()), path);
        graph->inputs = input_names(graph->session.get(), path);
        return graph;
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

    std::vector<std::string> input_names(const OrtSession* session, const std::string& path) const {
        OrtAllocator* allocator = nullptr;
        ort.check(ort.api->GetAllocatorWithDefaultOptions(&allocator), path);
        std::size_t count = 0;
        ort.check(ort.api->SessionGetInputCount(session, &count), path);
        std::vector<std::string> names;
        for (std::size_t k = 0; k < count; ++k) {
            char* name = nullptr;
            ort.check(ort.api->SessionGetInputName(session, k, allocator, &name), path);
            names.emplace_back(name);
            ort.check(ort.api->AllocatorFree(allocator, name), path);
        }
        return names;
    }

    Handle<OrtEnv> environment_;
    std::array<std::string, 3> paths_;
    Options options_;
    bool cuda_;
    std::vector<std::int64_t> shape_;
    std::size_t size_;
    Decoder decoder_;
    std::mutex mutex_;
    std::array<std::unique_ptr<Graph>, 3> graphs_;
};

/// Buffers of one batch, and what is bound to them. x and h have two each: a step reads one and writes the other.
class OrtState final : public State {
public:
    OrtState(std::shared_ptr<OrtNetwork> network, std::size_t batch)
        : network_(std::move(network)), ort_(network_->ort), memory_(network_->memory()), info_(network_->memory_info()),
          numbers_(batch * network_->size()), batch_(batch), staged_(numbers_ + kColumns) {
        const auto shape = network_->batched(batch);
        for (const char* name : {"x", "x_next", "h", "h_next", "z"})
            add(name, numbers_ * sizeof(float), shape, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
        add("label", batch * sizeof(std::int64_t), {shape[0]}, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
        add("row", sizeof(Row), {kColumns}, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
    }

    void begin(std::span<const float> x, std::span<const std::int64_t> labels, std::span<const float> h) override {
        current_ = 0;
        memory_->upload(*value("x").buffer, x.data(), x.size_bytes());
        if (h.empty())
            memory_->clear(*value("h").buffer, numbers_ * sizeof(float));
        else
            memory_->upload(*value("h").buffer, h.data(), h.size_bytes());
        if (!labels.empty()) memory_->upload(*value("label").buffer, labels.data(), labels.size_bytes());
    }

    std::span<float> noise() override { return std::span(staged_).first(numbers_); }

    void step(const Row& row) override {
        const std::size_t which = row[kGuidance] == 1.0f ? kPlain : kGuided;
        auto& bindings = bindings_[which];
        const Graph& graph = network_->graph(which);
        if (bindings.empty()) bindings = bind(graph);
        memory_->upload(*value("row").buffer, row.data(), sizeof row);
        if (row[kNoise] != 0) memory_->upload(*value("z").buffer, staged_.data(), numbers_ * sizeof(float));
        ort_.check(ort_.api->RunWithBinding(graph.session.get(), nullptr, bindings[current_].get()), "step");
        current_ = 1 - current_;
    }

    void read(std::span<float> x, std::span<float> h) override {
        if (!x.empty()) memory_->download(x.data(), *value(current_ ? "x_next" : "x").buffer, x.size_bytes());
        if (!h.empty()) memory_->download(h.data(), *value(current_ ? "h_next" : "h").buffer, h.size_bytes());
    }

private:
    struct Value {
        std::string name;
        std::unique_ptr<Buffer> buffer;
        Handle<OrtValue> tensor;
    };

    void add(const char* name, std::size_t bytes, const std::vector<std::int64_t>& shape, ONNXTensorElementDataType type) {
        Value value{name, memory_->allocate(bytes), Handle<OrtValue>(ort_.api->ReleaseValue)};
        ort_.check(ort_.api->CreateTensorWithDataAsOrtValue(info_.get(), value.buffer->data(), bytes, shape.data(),
                                                            shape.size(), type, value.tensor.out()),
                   name);
        memory_->clear(*value.buffer, bytes);
        values_.push_back(std::move(value));
    }

    Value& value(std::string_view name) {
        return *std::ranges::find(values_, name, &Value::name);
    }

    /// Two bindings: from the first buffers to the second, and back.
    std::vector<Handle<OrtIoBinding>> bind(const Graph& graph) {
        std::vector<Handle<OrtIoBinding>> bindings;
        for (const bool back : {false, true}) {
            Handle<OrtIoBinding> binding(ort_.api->ReleaseIoBinding);
            ort_.check(ort_.api->CreateIoBinding(graph.session.get(), binding.out()), "binding");
            for (const std::string& name : graph.inputs) {
                const bool state = name == "x" || name == "h";
                const auto& source = value(state && back ? name + "_next" : name);
                ort_.check(ort_.api->BindInput(binding.get(), name.c_str(), source.tensor.get()), name);
            }
            for (const std::string name : {"x", "h"}) {
                const auto& target = value(back ? name : name + "_next");
                ort_.check(ort_.api->BindOutput(binding.get(), (name + "_next").c_str(), target.tensor.get()), name);
            }
            bindings.push_back(std::move(binding));
        }
        return bindings;
    }

    std::shared_ptr<OrtNetwork> network_;
    const Ort& ort_;
    std::unique_ptr<Memory> memory_;
    Handle<OrtMemoryInfo> info_;
    std::size_t numbers_, batch_;
    std::vector<float> staged_;
    std::vector<Value> values_;
    std::vector<Handle<OrtIoBinding>> bindings_[2];
    std::size_t current_ = 0;
};

std::unique_ptr<State> OrtNetwork::state(std::size_t batch) {
    return std::make_unique<OrtState>(shared_from_this(), batch);
}

} // namespace

std::shared_ptr<Network> open_onnxruntime(const Bundle& bundle, const Options& options) {
    return std::make_shared<OrtNetwork>(bundle, options, false);
}

std::shared_ptr<Network> open_onnxruntime_cuda(const Bundle& bundle, const Options& options) {
    return std::make_shared<OrtNetwork>(bundle, options, true);
}

} // namespace diffx::core
