// TensorRT and TensorRT for RTX: engines that `diffx build` made, run on a CUDA device. One code path serves both
// products. Engines are shared by all samplers; a state has an execution context of its own for each graph, and a
// stream.
#include <NvInferRuntime.h>

#include <algorithm>
#include <map>
#include <mutex>

#include "backends/buffers.hpp"
#include "backends/engines.hpp"
#include "backends/library.hpp"
#include "backends/open.hpp"
#include "error.hpp"
#include "files.hpp"

namespace diffx::core {
namespace {

/// Keeps what the runtime last complained of; it returns null or false and says why here.
class Complaints final : public nvinfer1::ILogger {
public:
    void log(Severity severity, const char* message) noexcept override {
        if (severity > Severity::kERROR) return;
        const std::scoped_lock lock(mutex_);
        try {
            last_ = message;
        } catch (...) {
            last_.clear();
        }
    }
    std::string last() const {
        const std::scoped_lock lock(mutex_);
        return last_.empty() ? "it does not say why" : last_.substr(0, last_.find('\n'));
    }

private:
    mutable std::mutex mutex_;
    std::string last_;
};

/// A TensorRT: its library and its runtime object.
class Product {
public:
    Product(const char* backend, const char* module, const char* variable, const char* names, const char* install)
        : library_(backend, variable, names, install), name_(module) {
        const int major = number("Major");
        for (const char* part : {"Major", "Minor", "Patch", "Build"})
            version_.append(version_.empty() ? "" : ".").append(std::to_string(number(part)));
        // RTX counts its versions apart, and keeps the interface of the headers; TensorRT may change it with each major
        // one.
        const bool rtx = std::string_view(backend) == "trt-rtx";
        if (!rtx && major != NV_TENSORRT_MAJOR)
            throw error(DIFFX_BACKEND_ERROR, "backend '", backend, "': ", library_.name(), " is version ", version_,
                        ", this library was built with the headers of ", NV_TENSORRT_MAJOR,
                        "; build it again with those of ", major);
        const std::int32_t asked = rtx ? library_.symbol<std::int32_t()>("getInferLibVersion")() : NV_TENSORRT_VERSION;
        runtime_.reset(static_cast<nvinfer1::IRuntime*>(
            library_.symbol<void*(void*, std::int32_t)>("createInferRuntime_INTERNAL")(&complaints_, asked)));
        if (!runtime_)
            throw error(DIFFX_BACKEND_ERROR, "backend '", backend, "': no runtime object (", complaints_.last(), ")");
    }

    std::unique_ptr<nvinfer1::ICudaEngine> engine(const std::filesystem::path& file) {
        const std::string plan = read_file(file);
        std::unique_ptr<nvinfer1::ICudaEngine> engine(runtime_->deserializeCudaEngine(plan.data(), plan.size()));
        if (!engine) throw error(DIFFX_BACKEND_ERROR, file.string(), ": cannot be loaded (", complaints_.last(), ")");
        return engine;
    }

    /// Refuse to go on where the runtime did.
    void must(bool done, const std::string& what) const {
        if (!done) throw error(DIFFX_BACKEND_ERROR, "TensorRT refuses ", what, " (", complaints_.last(), ")");
    }

    const std::string& name() const { return name_; }
    const std::string& version() const { return version_; }

private:
    int number(const char* part) const {
        return library_.symbol<std::int32_t()>((std::string("getInferLib") + part + "Version").c_str())();
    }

    Complaints complaints_;
    Library library_;
    std::string name_, version_;
    std::unique_ptr<nvinfer1::IRuntime> runtime_;
};

class TensorRtNetwork final : public Network, public std::enable_shared_from_this<TensorRtNetwork> {
public:
    TensorRtNetwork(const Bundle& bundle, const Options& options, const char* backend, std::unique_ptr<Product> product)
        : trt(std::move(product)), manifest(bundle.manifest()), options_(options),
          capability_(cuda_capability(options.device)),
          engines_(engines_for(bundle, {backend, trt->name(), trt->version(), capability_})) {}

    std::string device() const override {
        return "CUDA device " + std::to_string(options_.device) + " (" + capability_ + "), " + trt->name() + " " +
               trt->version();
    }
    std::unique_ptr<State> state(std::size_t batch) override;
    void decode(std::span<const float> latents, std::array<std::int64_t, 2> sides, std::span<float> image) override;

    std::unique_ptr<CudaMemory> memory() const { return cuda_memory(options_.device); }
    Choice choice(std::size_t graph, std::size_t batch) const { return choose(engines_, kGraphs[graph], batch); }

    /// The largest batch that either step graph is run at for a batch.
    std::size_t room(std::size_t batch) const {
        std::size_t most = 0;
        for (const std::size_t graph : {kPlain, kGuided})
            if (std::ranges::find(engines_, kGraphs[graph], &Engine::graph) != engines_.end())
                most = std::max(most, choice(graph, batch).batch);
        return most;
    }

    /// A context for an engine, at one of its profiles.
    std::unique_ptr<nvinfer1::IExecutionContext> context(std::size_t graph, const Choice& chosen, void* stream) {
        nvinfer1::ICudaEngine* engine = nullptr;
        {
            const std::scoped_lock lock(mutex_);
            auto& kept = loaded_[chosen.engine->file.string()];
            if (!kept) kept = trt->engine(chosen.engine->file);
            engine = kept.get();
        }
        std::unique_ptr<nvinfer1::IExecutionContext> context(engine->createExecutionContext());
        trt->must(context != nullptr, std::string("a context for ") + kGraphs[graph]);
        trt->must(context->setOptimizationProfileAsync(static_cast<std::int32_t>(chosen.profile),
                                                       static_cast<cudaStream_t>(stream)),
                  "profile " + std::to_string(chosen.profile));
        return context;
    }

    std::unique_ptr<Product> trt;
    const Manifest manifest;

private:
    Options options_;
    std::string capability_;
    std::vector<Engine> engines_;
    std::mutex mutex_;
    std::map<std::string, std::unique_ptr<nvinfer1::ICudaEngine>> loaded_;
};

nvinfer1::Dims dims_of(std::span<const std::int64_t> shape) {
    nvinfer1::Dims dims{};
    dims.nbDims = static_cast<std::int32_t>(shape.size());
    std::ranges::copy(shape, dims.d);
    return dims;
}

class TensorRtState final : public BufferedState {
public:
    TensorRtState(std::shared_ptr<TensorRtNetwork> network, std::unique_ptr<Memory> memory, void* stream,
                  std::size_t batch)
        : BufferedState(std::move(memory), network->manifest, network->room(batch)), network_(std::move(network)),
          stream_(static_cast<cudaStream_t>(stream)), batch_(batch) {}

private:
    void run(std::size_t graph, bool back) override {
        auto& context = contexts_[graph];
        if (!context) context = prepare(graph);
        for (const char* name : {"x", "h", "z", "row", "label", "x_next", "h_next"})
            if (const std::size_t found = place(name, back); found < slots().size())
                network_->trt->must(context->setTensorAddress(name, slots()[found].buffer->data()),
                                    std::string("the place of ") + name);
        network_->trt->must(context->enqueueV3(stream_), std::string("to run ") + kGraphs[graph]);
    }

    std::unique_ptr<nvinfer1::IExecutionContext> prepare(std::size_t graph) {
        const Choice chosen = network_->choice(graph, batch_);
        auto context = network_->context(graph, chosen, stream_);
        for (const char* name : {"x", "h", "z", "row", "label"})
            if (const std::size_t found = place(name, false); found < slots().size()) {
                auto shape = slots()[found].shape;
                if (std::string_view(name) != "row") shape[0] = static_cast<std::int64_t>(chosen.batch);
                network_->trt->must(context->setInputShape(name, dims_of(shape)), std::string("the shape of ") + name);
            }
        return context;
    }

    std::shared_ptr<TensorRtNetwork> network_;
    cudaStream_t stream_;
    std::size_t batch_;
    std::unique_ptr<nvinfer1::IExecutionContext> contexts_[2];
};

std::unique_ptr<State> TensorRtNetwork::state(std::size_t batch) {
    auto place = memory();
    void* const stream = place->stream();
    return std::make_unique<TensorRtState>(shared_from_this(), std::move(place), stream, batch);
}

void TensorRtNetwork::decode(std::span<const float> latents, std::array<std::int64_t, 2> sides,
                             std::span<float> image) {
    const auto place = memory();
    const Choice chosen = choice(kDecoder, 1);
    const auto x = place->allocate(chosen.batch * latents.size_bytes()),
               pixels = place->allocate(chosen.batch * image.size_bytes());
    place->clear(*x, chosen.batch * latents.size_bytes());
    place->upload(*x, latents.data(), latents.size_bytes());
    const auto context = this->context(kDecoder, chosen, place->stream());
    const std::int64_t shape[] = {static_cast<std::int64_t>(chosen.batch), manifest.shape[0], sides[0], sides[1]};
    trt->must(context->setInputShape("x", dims_of(shape)), "the shape of the latents");
    trt->must(context->setTensorAddress("x", x->data()) && context->setTensorAddress("image", pixels->data()),
              "the place of an image");
    trt->must(context->enqueueV3(static_cast<cudaStream_t>(place->stream())), "to decode");
    place->download(image.data(), *pixels, image.size_bytes());
}

} // namespace

std::shared_ptr<Network> open_tensorrt(const Bundle& bundle, const Options& options) {
    auto product = std::make_unique<Product>("trt", "tensorrt", "DIFFX_TENSORRT_LIBRARY", DIFFX_TENSORRT_LIBRARY,
                                             "install TensorRT");
    return std::make_shared<TensorRtNetwork>(bundle, options, "trt", std::move(product));
}

std::shared_ptr<Network> open_tensorrt_rtx(const Bundle& bundle, const Options& options) {
    auto product = std::make_unique<Product>("trt-rtx", "tensorrt_rtx", "DIFFX_TENSORRT_RTX_LIBRARY",
                                             DIFFX_TENSORRT_RTX_LIBRARY, "install TensorRT for RTX");
    return std::make_shared<TensorRtNetwork>(bundle, options, "trt-rtx", std::move(product));
}

} // namespace diffx::core
