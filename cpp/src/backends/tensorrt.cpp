// TensorRT and TensorRT for RTX: engines that `diffx build` made, run on a CUDA device. One code path serves both
// products. Engines are shared by all samplers; a state has an execution context of its own for each graph, and a
// stream. TensorRT's steps are recorded as CUDA graphs, one for each direction of the buffers.
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

/// The major version of TensorRT whose interface a version has. RTX counts apart, from 1: its runtime objects have the
/// interface of TensorRT 10 up to 1.4, and that of 11 from 1.5 on.
constexpr int interface_of(int major, int minor) {
    if (major != 1) return major;
    return minor < 5 ? 10 : 11;
}

/// A TensorRT: its library and its runtime object.
class Product {
public:
    Product(const char* backend, const char* module, const char* variable, const char* names, const char* install)
        : library_(backend, variable, names, install), name_(module) {
        for (const char* part : {"Major", "Minor", "Patch", "Build"})
            version_.append(version_.empty() ? "" : ".").append(std::to_string(number(part)));
        const int interface = interface_of(number("Major"), number("Minor"));
        constexpr int headers = interface_of(NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR);
        if (interface != headers)
            throw error(DIFFX_BACKEND_ERROR, "backend '", backend, "': ", library_.name(), " is version ", version_,
                        ", which has the interface of TensorRT ", interface,
                        "; this library was built with the headers of ", headers, ", build it again with those of ",
                        interface);
        const bool rtx = std::string_view(backend) == "trt-rtx";
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

    /// Whether a step may be recorded from outside; RTX does so by itself where its own headers ask for it.
    bool recordable() const { return name_ == "tensorrt"; }
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

    TensorRtNetwork(const TensorRtNetwork&) = delete;
    TensorRtNetwork& operator=(const TensorRtNetwork&) = delete;
    ~TensorRtNetwork() override;

    std::string device() const override {
        return "CUDA device " + std::to_string(options_.device) + " (" + capability_ + "), " + trt->name() + " " +
               trt->version();
    }
    std::size_t max_batch() const override { return core::max_batch(engines_); }
    std::unique_ptr<State> state(std::size_t batch) override;
    void decode(std::span<const float> latents, std::array<std::int64_t, 2> sides, std::span<float> image) override;

    std::unique_ptr<CudaMemory> memory() const { return cuda_memory(options_.device); }
    bool records() const { return options_.cuda_graph && trt->recordable(); }
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
    struct Decoding;
    std::unique_ptr<Decoding> take_idle();

    Options options_;
    std::string capability_;
    std::vector<Engine> engines_;
    std::mutex mutex_;
    std::map<std::string, std::unique_ptr<nvinfer1::ICudaEngine>> loaded_;
    std::vector<std::unique_ptr<Decoding>> idle_; // after the engines, which they use
};

nvinfer1::Dims dims_of(std::span<const std::int64_t> shape) {
    nvinfer1::Dims dims{};
    dims.nbDims = static_cast<std::int32_t>(shape.size());
    std::ranges::copy(shape, dims.d);
    return dims;
}

class TensorRtState final : public BufferedState {
public:
    /// cuda: the memory.
    TensorRtState(std::shared_ptr<TensorRtNetwork> network, CudaMemory& cuda, std::unique_ptr<Memory> memory,
                  std::size_t batch)
        : BufferedState(std::move(memory), network->manifest, network->room(batch)), network_(std::move(network)),
          cuda_(cuda), stream_(static_cast<cudaStream_t>(cuda.stream())), batch_(batch) {}
    TensorRtState(const TensorRtState&) = delete;
    TensorRtState& operator=(const TensorRtState&) = delete;
    ~TensorRtState() override { cuda_.drain(); } // contexts must not go while they run

private:
    /// The first step of a graph in a direction allocates what it needs, which a recording must not; the second is
    /// recorded.
    void run(std::size_t graph, bool back) override {
        Step& step = steps_[graph][back];
        if (!step.recorded && step.has_run && network_->records()) step.recorded = record(graph, back);
        if (step.recorded)
            step.recorded->launch();
        else
            enqueue(graph, back);
        step.has_run = true;
    }

    std::unique_ptr<Recorded> record(std::size_t graph, bool back) {
        try {
            return cuda_.record([&] { enqueue(graph, back); });
        } catch (const Error& problem) {
            throw error(problem.status, problem.what(),
                        "; a step cannot be recorded as a CUDA graph: turn that off with ",
                        "--no-cuda-graph (cuda_graph of diffx_options)");
        }
    }

    void enqueue(std::size_t graph, bool back) {
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

    /// A step graph in one direction of the buffers.
    struct Step {
        bool has_run = false;
        std::unique_ptr<Recorded> recorded;
    };

    std::shared_ptr<TensorRtNetwork> network_;
    CudaMemory& cuda_;
    cudaStream_t stream_;
    std::size_t batch_;
    std::unique_ptr<nvinfer1::IExecutionContext> contexts_[2];
    Step steps_[2][2];
};

/// Everything that decoding one image takes; the tiles of a bundle are all of the same size.
struct TensorRtNetwork::Decoding {
    Decoding(TensorRtNetwork& network, std::size_t latent_bytes, std::array<std::int64_t, 2> sides,
             std::size_t image_bytes)
        : memory(network.memory()) {
        const Choice chosen = network.choice(kDecoder, 1);
        x = memory->allocate(chosen.batch * latent_bytes);
        image = memory->allocate(chosen.batch * image_bytes);
        memory->clear(*x, chosen.batch * latent_bytes);
        context = network.context(kDecoder, chosen, memory->stream());
        const std::int64_t shape[] = {static_cast<std::int64_t>(chosen.batch), network.manifest.shape[0], sides[0],
                                      sides[1]};
        network.trt->must(context->setInputShape("x", dims_of(shape)), "the shape of the latents");
        network.trt->must(context->setTensorAddress("x", x->data()) &&
                              context->setTensorAddress("image", image->data()),
                          "the place of an image");
    }
    Decoding(const Decoding&) = delete;
    Decoding& operator=(const Decoding&) = delete;
    ~Decoding() { memory->drain(); }

    std::unique_ptr<CudaMemory> memory;
    std::unique_ptr<Buffer> x, image;
    std::unique_ptr<nvinfer1::IExecutionContext> context;
};

std::unique_ptr<TensorRtNetwork::Decoding> TensorRtNetwork::take_idle() {
    const std::scoped_lock lock(mutex_);
    if (idle_.empty()) return nullptr;
    std::unique_ptr<Decoding> decoding = std::move(idle_.back());
    idle_.pop_back();
    return decoding;
}

TensorRtNetwork::~TensorRtNetwork() = default;

std::unique_ptr<State> TensorRtNetwork::state(std::size_t batch) {
    auto place = memory();
    CudaMemory& cuda = *place;
    return std::make_unique<TensorRtState>(shared_from_this(), cuda, std::move(place), batch);
}

void TensorRtNetwork::decode(std::span<const float> latents, std::array<std::int64_t, 2> sides,
                             std::span<float> image) {
    std::unique_ptr<Decoding> decoding = take_idle();
    if (!decoding) decoding = std::make_unique<Decoding>(*this, latents.size_bytes(), sides, image.size_bytes());
    CudaMemory& cuda = *decoding->memory;
    cuda.upload(*decoding->x, latents.data(), latents.size_bytes());
    trt->must(decoding->context->enqueueV3(static_cast<cudaStream_t>(cuda.stream())), "to decode");
    cuda.download(image.data(), *decoding->image, image.size_bytes());
    const std::scoped_lock lock(mutex_);
    idle_.push_back(std::move(decoding));
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
