// A GPU that is simulated, to run the TensorRT backend on any machine: the functions of the CUDA runtime and of
// TensorRT that the library looks up, in one file for both. As in tests/simulated_gpu.py, the calls keep the order and
// the promises of the real ones, the unkind ones too: work on a stream happens when it is waited for, a copy from
// pinned memory reads it then, a recording refuses what it must not hold, an engine refuses a shape that its profile
// lacks, new memory holds rubbish, and what is not freed is reported when the program ends. What an engine computes is
// computed by ONNX Runtime.
//
// SIMULATED_GPU_BUNDLE: whose engines can be loaded. SIMULATED_GPU_VERSION: of TensorRT, "11.4.0.1".
#include <dlfcn.h>
#include <onnxruntime_c_api.h>

#include <NvInferRuntime.h>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace {

using Work = std::function<void()>;
using Works = std::vector<Work>;

constexpr int kOk = 0, kInvalid = 1, kUnsupported = 900;

[[noreturn]] void broken(const char* promise) {
    std::fprintf(stderr, "simulated GPU: %s\n", promise);
    std::_Exit(70);
}

/// Memory by its address, one map for each kind.
class Blocks {
public:
    void* add(std::size_t size) {
        auto block = std::make_unique<std::byte[]>(size + 1);
        std::memset(block.get(), 0xa5, size + 1);
        void* address = block.get();
        blocks_[static_cast<std::byte*>(address)] = {size, std::move(block)};
        return address;
    }
    bool remove(const void* address) { return blocks_.erase(static_cast<const std::byte*>(address)) == 1; }
    bool holds(const void* address, std::size_t size) const {
        const auto* first = static_cast<const std::byte*>(address);
        auto found = blocks_.upper_bound(first);
        return found != blocks_.begin() && first + size <= (--found)->first + found->second.first;
    }
    std::size_t count() const { return blocks_.size(); }

private:
    std::map<const std::byte*, std::pair<std::size_t, std::unique_ptr<std::byte[]>>> blocks_;
};

} // namespace

struct CUstream_st {
    std::deque<Work> queue;
    std::size_t done = 0; // pieces of work that were taken from the queue
    bool recording = false;
    Works recorded;

    void put(Work work) {
        if (recording)
            recorded.push_back(std::move(work));
        else
            queue.push_back(std::move(work));
    }
    void flush(std::size_t until) {
        for (; done < until && !queue.empty(); ++done) {
            const Work work = std::move(queue.front());
            queue.pop_front();
            work();
        }
    }
    void flush() { flush(done + queue.size()); }
};
struct CUevent_st {
    CUstream_st* stream = nullptr;
    std::size_t place = 0;
};
struct CUgraph_st {
    Works works;
};
struct CUgraphExec_st {
    Works works;
};

namespace {

std::recursive_mutex mutex; // of everything below; one thread at a time is on the device
Blocks device, pinned;
long streams = 0, events = 0, graphs = 0, contexts = 0, launched = 0, enqueued = 0, allocations = 0;
bool capturing = false;

struct Report {
    ~Report() {
        std::fprintf(stderr,
                     "device %zu pinned %zu streams %ld events %ld graphs %ld contexts %ld launched %ld enqueued %ld "
                     "allocations %ld\n",
                     device.count(), pinned.count(), streams, events, graphs, contexts, launched, enqueued,
                     allocations);
    }
} report;

int allocate(Blocks& blocks, void** address, std::size_t size) {
    const std::scoped_lock lock(mutex);
    if (capturing) return kUnsupported;
    ++allocations;
    *address = blocks.add(size);
    return kOk;
}

int release(Blocks& blocks, const void* address) {
    const std::scoped_lock lock(mutex);
    return address == nullptr || blocks.remove(address) ? kOk : kInvalid;
}

nlohmann::json read_json(const std::string& path) {
    std::ifstream file(path);
    return nlohmann::json::parse(file);
}

/// ONNX Runtime, which computes what engines do.
struct Ort {
    const OrtApi* api = nullptr;
    OrtEnv* environment = nullptr;
    OrtMemoryInfo* host = nullptr;
    Ort() {
        void* library = dlopen(std::getenv("DIFFX_ONNXRUNTIME_LIBRARY"), RTLD_NOW);
        api = reinterpret_cast<const OrtApiBase* (*)()>(dlsym(library, "OrtGetApiBase"))()->GetApi(ORT_API_VERSION);
        check(api->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "simulated", &environment));
        check(api->CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, &host));
    }
    void check(OrtStatus* status) const {
        if (status != nullptr) broken(api->GetErrorMessage(status));
    }
};
const Ort& ort() {
    static const Ort found;
    return found;
}

struct Tensor {
    bool integers;
    std::vector<nlohmann::json> sides; // numbers, or names of free ones
};

/// An engine's record, and the graph that it was built from.
struct Model {
    explicit Model(const std::string& folder) : record(read_json(folder + "/engine.json")) {
        for (const auto& [list, tensors] : {std::pair{"inputs", &inputs}, {"outputs", &outputs}})
            for (const auto& tensor : record["network"][list])
                (*tensors)[tensor["name"]] = {tensor["dtype"] == "INT64", tensor["shape"]};
        const std::string graph = record["key"]["graph"];
        const std::string path = std::string(std::getenv("SIMULATED_GPU_BUNDLE")) + "/" + graph + ".onnx";
        OrtSessionOptions* options = nullptr;
        ort().check(ort().api->CreateSessionOptions(&options));
        ort().check(ort().api->SetIntraOpNumThreads(options, 1));
        ort().check(ort().api->CreateSession(ort().environment, path.c_str(), options, &session));
        ort().api->ReleaseSessionOptions(options);
    }
    Model(const Model&) = delete;
    Model& operator=(const Model&) = delete;
    ~Model() { ort().api->ReleaseSession(session); }

    nlohmann::json record;
    std::map<std::string, Tensor> inputs, outputs;
    OrtSession* session = nullptr;
};

using Shapes = std::map<std::string, std::vector<std::int64_t>>;
using Places = std::map<std::string, void*>;

/// Run a graph on device memory.
void compute(const Model& model, const Shapes& shapes, const Places& places) {
    std::vector<const char*> names[2];
    std::vector<OrtValue*> values[2];
    for (const bool output : {false, true})
        for (const auto& [name, tensor] : output ? model.outputs : model.inputs) {
            const auto& shape = shapes.at(name);
            std::size_t bytes = tensor.integers ? sizeof(std::int64_t) : sizeof(float);
            for (const std::int64_t side : shape) bytes *= static_cast<std::size_t>(side);
            if (!device.holds(places.at(name), bytes)) broken("an engine reaches beyond its memory");
            OrtValue* value = nullptr;
            ort().check(ort().api->CreateTensorWithDataAsOrtValue(
                ort().host, places.at(name), bytes, shape.data(), shape.size(),
                tensor.integers ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, &value));
            names[output].push_back(name.c_str());
            values[output].push_back(value);
        }
    ort().check(ort().api->Run(model.session, nullptr, names[0].data(), values[0].data(), names[0].size(),
                               names[1].data(), names[1].size(), values[1].data()));
    for (const auto& list : values)
        for (OrtValue* value : list) ort().api->ReleaseValue(value);
}

class Context final : public nvinfer1::IExecutionContext {
public:
    explicit Context(std::shared_ptr<const Model> model) : model_(std::move(model)) { ++contexts; }
    Context(const Context&) = delete;
    Context& operator=(const Context&) = delete;
    ~Context() noexcept override {
        const std::scoped_lock lock(mutex);
        if (stream_ != nullptr && stream_->done < last_) broken("a context was freed before its work was done");
        --contexts;
    }

    bool setOptimizationProfileAsync(std::int32_t index, cudaStream_t) noexcept override {
        profile_ = static_cast<std::size_t>(index);
        warm_ = false;
        return profile_ < model_->record["key"]["profiles"].size();
    }
    bool setInputShape(const char* name, const nvinfer1::Dims& dims) noexcept override {
        const auto& sides = model_->inputs.at(name).sides;
        std::vector<std::int64_t> shape(dims.d, dims.d + dims.nbDims);
        if (shape.size() != sides.size()) return false;
        const auto& key = model_->record["key"];
        for (std::size_t k = 0; k < shape.size(); ++k) {
            std::int64_t least = 0, most = 0;
            if (sides[k].is_number())
                least = most = sides[k];
            else if (key["sides"].contains(sides[k]))
                least = most = key["sides"][std::string(sides[k])];
            else
                least = key["profiles"][profile_]["least"], most = key["profiles"][profile_]["most"];
            if (shape[k] < least || shape[k] > most) return false;
            if (sides[k].is_string()) free_[sides[k]] = shape[k];
        }
        shapes_[name] = std::move(shape);
        warm_ = false;
        return true;
    }
    bool setTensorAddress(const char* name, void* data) noexcept override {
        places_[name] = data;
        return model_->inputs.contains(name) || model_->outputs.contains(name);
    }
    bool enqueueV3(cudaStream_t stream) noexcept override {
        const std::scoped_lock lock(mutex);
        if (stream->recording && !warm_) return false; // the first run allocates
        for (const auto& [name, tensor] : model_->inputs)
            if (!shapes_.contains(name) || !places_.contains(name)) return false;
        for (const auto& [name, tensor] : model_->outputs) shapes_[name] = shape_of(tensor);
        warm_ = true;
        ++enqueued;
        stream->put([model = model_, shapes = shapes_, places = places_] { compute(*model, shapes, places); });
        stream_ = stream;
        last_ = stream->recording ? 0 : stream->done + stream->queue.size();
        return true;
    }

private:
    /// A side of an output is a number, the name of a free one, or such a name times a number: "2*height".
    std::vector<std::int64_t> shape_of(const Tensor& tensor) const {
        std::vector<std::int64_t> shape;
        for (const auto& side : tensor.sides) {
            if (side.is_number()) {
                shape.push_back(side);
                continue;
            }
            std::int64_t product = 1;
            std::string text = side;
            for (std::size_t star = 0; star != std::string::npos;) {
                star = text.find('*');
                const std::string factor = text.substr(0, star);
                product *= free_.contains(factor) ? free_.at(factor) : std::stoll(factor);
                if (star != std::string::npos) text.erase(0, star + 1);
            }
            shape.push_back(product);
        }
        return shape;
    }

    std::shared_ptr<const Model> model_;
    std::size_t profile_ = 0;
    bool warm_ = false;
    Shapes shapes_;
    Places places_;
    std::map<std::string, std::int64_t> free_;
    CUstream_st* stream_ = nullptr;
    std::size_t last_ = 0; // where its last work stands on the stream
};

class Engine final : public nvinfer1::ICudaEngine {
public:
    explicit Engine(const std::string& folder) : model_(std::make_shared<Model>(folder)) {}
    nvinfer1::IExecutionContext* createExecutionContext() noexcept override { return new Context(model_); }

private:
    std::shared_ptr<const Model> model_;
};

class Runtime final : public nvinfer1::IRuntime {
public:
    explicit Runtime(nvinfer1::ILogger* logger) : logger_(logger) {}
    /// An engine ends with the name of its folder; see tests/simulated_gpu.py.
    nvinfer1::ICudaEngine* deserializeCudaEngine(const void* blob, std::size_t size) noexcept override {
        const std::string data(static_cast<const char*>(blob), size);
        const std::string bundle = std::getenv("SIMULATED_GPU_BUNDLE");
        for (const char* graph : {"step-", "step_plain-", "decoder-"})
            if (const std::size_t place = data.rfind(graph); place != std::string::npos)
                return new Engine(bundle + "/engines/" + data.substr(place));
        logger_->log(nvinfer1::ILogger::Severity::kERROR, "the engine is damaged");
        return nullptr;
    }

private:
    nvinfer1::ILogger* logger_;
};

int version(std::size_t part) {
    std::string text = std::getenv("SIMULATED_GPU_VERSION");
    for (; part > 0; --part) text.erase(0, text.find('.') + 1);
    return std::stoi(text);
}

} // namespace

#define SIMULATED extern "C" __attribute__((visibility("default")))

SIMULATED std::int32_t getInferLibMajorVersion() {
    return version(0);
}
SIMULATED std::int32_t getInferLibMinorVersion() {
    return version(1);
}
SIMULATED std::int32_t getInferLibPatchVersion() {
    return version(2);
}
SIMULATED std::int32_t getInferLibBuildVersion() {
    return version(3);
}
SIMULATED std::int32_t getInferLibVersion() {
    return 10'000 * version(0) + 100 * version(1) + version(2);
}
SIMULATED void* createInferRuntime_INTERNAL(void* logger, std::int32_t) {
    return static_cast<nvinfer1::IRuntime*>(new Runtime(static_cast<nvinfer1::ILogger*>(logger)));
}

SIMULATED const char* cudaGetErrorString(int status) {
    return status == kInvalid ? "invalid argument" : "operation not permitted when stream is capturing";
}
SIMULATED int cudaDriverGetVersion(int* found) {
    *found = 13'000;
    return kOk;
}
SIMULATED int cudaSetDevice(int index) {
    return index == 0 ? kOk : kInvalid;
}
SIMULATED int cudaDeviceGetAttribute(int* value, int attribute, int index) {
    *value = attribute == 75 ? 8 : 6; // sm86
    return index == 0 ? kOk : kInvalid;
}
SIMULATED int cudaMalloc(void** address, std::size_t size) {
    return allocate(device, address, size);
}
SIMULATED int cudaFree(void* address) {
    return release(device, address);
}
SIMULATED int cudaMallocHost(void** address, std::size_t size) {
    return allocate(pinned, address, size);
}
SIMULATED int cudaFreeHost(void* address) {
    return release(pinned, address);
}
SIMULATED int cudaMemcpyAsync(void* to, const void* from, std::size_t size, int kind, cudaStream_t stream) {
    const std::scoped_lock lock(mutex);
    if (!device.holds(kind == 1 ? to : from, size)) return kInvalid;
    if (kind == 2) { // to pageable memory: when it returns, it is there
        if (stream->recording) return kUnsupported;
        stream->flush();
        std::memcpy(to, from, size);
    } else if (pinned.holds(from, size)) {
        stream->put([=] { std::memcpy(to, from, size); });
    } else {
        const auto* bytes = static_cast<const std::byte*>(from);
        stream->put([to, staged = std::vector<std::byte>(bytes, bytes + size)] {
            std::memcpy(to, staged.data(), staged.size());
        });
    }
    return kOk;
}
SIMULATED int cudaMemsetAsync(void* address, int value, std::size_t size, cudaStream_t stream) {
    const std::scoped_lock lock(mutex);
    if (!device.holds(address, size)) return kInvalid;
    stream->put([=] { std::memset(address, value, size); });
    return kOk;
}
SIMULATED int cudaStreamCreate(cudaStream_t* stream) {
    const std::scoped_lock lock(mutex);
    *stream = new CUstream_st;
    ++streams;
    return kOk;
}
SIMULATED int cudaStreamDestroy(cudaStream_t stream) {
    const std::scoped_lock lock(mutex);
    stream->flush();
    delete stream;
    --streams;
    return kOk;
}
SIMULATED int cudaStreamSynchronize(cudaStream_t stream) {
    const std::scoped_lock lock(mutex);
    if (stream->recording) return kUnsupported;
    stream->flush();
    return kOk;
}
SIMULATED int cudaEventCreate(CUevent_st** event) {
    const std::scoped_lock lock(mutex);
    *event = new CUevent_st;
    ++events;
    return kOk;
}
SIMULATED int cudaEventDestroy(CUevent_st* event) {
    const std::scoped_lock lock(mutex);
    delete event;
    --events;
    return kOk;
}
SIMULATED int cudaEventRecord(CUevent_st* event, cudaStream_t stream) {
    const std::scoped_lock lock(mutex);
    *event = {stream, stream->done + stream->queue.size()};
    return kOk;
}
SIMULATED int cudaEventSynchronize(CUevent_st* event) {
    const std::scoped_lock lock(mutex);
    if (event->stream != nullptr) event->stream->flush(event->place);
    return kOk;
}
SIMULATED int cudaStreamBeginCapture(cudaStream_t stream, int) {
    const std::scoped_lock lock(mutex);
    stream->recording = capturing = true;
    stream->recorded.clear();
    return kOk;
}
SIMULATED int cudaStreamEndCapture(cudaStream_t stream, CUgraph_st** graph) {
    const std::scoped_lock lock(mutex);
    stream->recording = capturing = false;
    *graph = new CUgraph_st{std::move(stream->recorded)};
    ++graphs;
    return kOk;
}
SIMULATED int cudaGraphInstantiateWithFlags(CUgraphExec_st** executable, CUgraph_st* graph, unsigned long long) {
    const std::scoped_lock lock(mutex);
    *executable = new CUgraphExec_st{graph->works};
    ++graphs;
    return kOk;
}
SIMULATED int cudaGraphDestroy(CUgraph_st* graph) {
    const std::scoped_lock lock(mutex);
    delete graph;
    --graphs;
    return kOk;
}
SIMULATED int cudaGraphExecDestroy(CUgraphExec_st* executable) {
    const std::scoped_lock lock(mutex);
    delete executable;
    --graphs;
    return kOk;
}
SIMULATED int cudaGraphLaunch(CUgraphExec_st* executable, cudaStream_t stream) {
    const std::scoped_lock lock(mutex);
    ++launched;
    for (const Work& work : executable->works) stream->put(work);
    return kOk;
}
