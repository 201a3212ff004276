// The few functions of the CUDA runtime that buffers need, looked up in its library when a CUDA device is asked for.
#include <cstring>

#include "backends/library.hpp"
#include "backends/memory.hpp"
#include "error.hpp"

struct CUstream_st;
struct CUevent_st;
struct CUgraph_st;
struct CUgraphExec_st;

namespace diffx::core {
namespace {

// As cuda_runtime_api.h has them; a status is an int, 0 for success.
constexpr int kToDevice = 1, kToHost = 2;                   // cudaMemcpyKind
constexpr int kCapabilityMajor = 75, kCapabilityMinor = 76; // cudaDeviceAttr
constexpr int kThisThread = 1;                              // cudaStreamCaptureMode
using Stream = CUstream_st*;
using Event = CUevent_st*;
using Graph = CUgraph_st*;
using Executable = CUgraphExec_st*;

class Cuda {
    Library library_{"cuda", "DIFFX_CUDART_LIBRARY", DIFFX_CUDART_LIBRARY, "install the CUDA runtime"};

public:
    int (*driver_version)(int*) = library_.symbol<int(int*)>("cudaDriverGetVersion");
    int (*set_device)(int) = library_.symbol<int(int)>("cudaSetDevice");
    int (*attribute)(int*, int, int) = library_.symbol<int(int*, int, int)>("cudaDeviceGetAttribute");
    int (*allocate)(void**, std::size_t) = library_.symbol<int(void**, std::size_t)>("cudaMalloc");
    int (*free)(void*) = library_.symbol<int(void*)>("cudaFree");
    int (*copy)(void*, const void*, std::size_t, int,
                Stream) = library_.symbol<int(void*, const void*, std::size_t, int, Stream)>("cudaMemcpyAsync");
    int (*set)(void*, int, std::size_t,
               Stream) = library_.symbol<int(void*, int, std::size_t, Stream)>("cudaMemsetAsync");
    int (*allocate_pinned)(void**, std::size_t) = library_.symbol<int(void**, std::size_t)>("cudaMallocHost");
    int (*free_pinned)(void*) = library_.symbol<int(void*)>("cudaFreeHost");
    int (*event_create)(Event*) = library_.symbol<int(Event*)>("cudaEventCreate");
    int (*event_destroy)(Event) = library_.symbol<int(Event)>("cudaEventDestroy");
    int (*event_record)(Event, Stream) = library_.symbol<int(Event, Stream)>("cudaEventRecord");
    int (*event_synchronize)(Event) = library_.symbol<int(Event)>("cudaEventSynchronize");
    int (*begin_capture)(Stream, int) = library_.symbol<int(Stream, int)>("cudaStreamBeginCapture");
    int (*end_capture)(Stream, Graph*) = library_.symbol<int(Stream, Graph*)>("cudaStreamEndCapture");
    int (*instantiate)(Executable*, Graph, unsigned long long) =
        library_.symbol<int(Executable*, Graph, unsigned long long)>("cudaGraphInstantiateWithFlags");
    int (*graph_destroy)(Graph) = library_.symbol<int(Graph)>("cudaGraphDestroy");
    int (*launch)(Executable, Stream) = library_.symbol<int(Executable, Stream)>("cudaGraphLaunch");
    int (*executable_destroy)(Executable) = library_.symbol<int(Executable)>("cudaGraphExecDestroy");
    int (*stream_create)(Stream*) = library_.symbol<int(Stream*)>("cudaStreamCreate");
    int (*stream_destroy)(Stream) = library_.symbol<int(Stream)>("cudaStreamDestroy");
    int (*synchronize)(Stream) = library_.symbol<int(Stream)>("cudaStreamSynchronize");
    const char* (*message)(int) = library_.symbol<const char*(int)>("cudaGetErrorString");

    void check(int status) const {
        if (status != 0) throw error(DIFFX_BACKEND_ERROR, "CUDA: ", message(status), " (error ", status, ")");
    }
};

const Cuda& cuda() {
    static const Cuda found;
    int version = 0;
    found.check(found.driver_version(&version));
    if (version == 0) throw error(DIFFX_BACKEND_ERROR, "CUDA: this machine has no NVIDIA driver");
    return found;
}

/// Pinned memory, and the event that says when what it held was sent.
class Staging {
public:
    Staging(const Cuda& cuda, std::size_t bytes) : cuda_(cuda) {
        cuda_.check(cuda_.allocate_pinned(&data_, bytes));
        if (const int status = cuda_.event_create(&sent_); status != 0) {
            cuda_.free_pinned(data_);
            cuda_.check(status);
        }
    }
    Staging(const Staging&) = delete;
    Staging& operator=(const Staging&) = delete;
    ~Staging() {
        cuda_.event_synchronize(sent_);
        cuda_.event_destroy(sent_);
        cuda_.free_pinned(data_);
    }
    void send(void* to, const void* from, std::size_t bytes, Stream stream) {
        cuda_.check(cuda_.event_synchronize(sent_));
        std::memcpy(data_, from, bytes);
        cuda_.check(cuda_.copy(to, data_, bytes, kToDevice, stream));
        cuda_.check(cuda_.event_record(sent_, stream));
    }

private:
    const Cuda& cuda_;
    void* data_ = nullptr;
    Event sent_ = nullptr;
};

class DeviceBuffer final : public Buffer {
public:
    DeviceBuffer(const Cuda& cuda, std::size_t bytes) : cuda_(cuda), bytes_(bytes) {
        cuda_.check(cuda_.allocate(&data_, bytes));
    }
    DeviceBuffer(const DeviceBuffer&) = delete;
    DeviceBuffer& operator=(const DeviceBuffer&) = delete;
    ~DeviceBuffer() override { cuda_.free(data_); }
    void* data() override { return data_; }
    Staging& staging() {
        if (!staging_) staging_ = std::make_unique<Staging>(cuda_, bytes_);
        return *staging_;
    }

private:
    const Cuda& cuda_;
    std::size_t bytes_;
    void* data_ = nullptr;
    std::unique_ptr<Staging> staging_; // of a buffer that is uploaded to
};

class RecordedGraph final : public Recorded {
public:
    RecordedGraph(const Cuda& cuda, Executable executable, Stream stream)
        : cuda_(cuda), executable_(executable), stream_(stream) {}
    RecordedGraph(const RecordedGraph&) = delete;
    RecordedGraph& operator=(const RecordedGraph&) = delete;
    ~RecordedGraph() override { cuda_.executable_destroy(executable_); }
    void launch() override { cuda_.check(cuda_.launch(executable_, stream_)); }

private:
    const Cuda& cuda_;
    Executable executable_;
    Stream stream_;
};

class DeviceMemory final : public CudaMemory {
public:
    explicit DeviceMemory(int device) : cuda_(cuda()), device_(device) {
        cuda_.check(cuda_.set_device(device));
        cuda_.check(cuda_.stream_create(&stream_));
    }
    DeviceMemory(const DeviceMemory&) = delete;
    DeviceMemory& operator=(const DeviceMemory&) = delete;
    ~DeviceMemory() override { cuda_.stream_destroy(stream_); }

    std::unique_ptr<Buffer> allocate(std::size_t bytes) override {
        return std::make_unique<DeviceBuffer>(cuda_, bytes);
    }
    void upload(Buffer& to, const void* from, std::size_t bytes) override {
        cuda_.check(cuda_.set_device(device_)); // a sampler may have gone to another thread
        dynamic_cast<DeviceBuffer&>(to).staging().send(to.data(), from, bytes, stream_);
    }
    void download(void* to, Buffer& from, std::size_t bytes) override {
        cuda_.check(cuda_.copy(to, from.data(), bytes, kToHost, stream_));
        cuda_.check(cuda_.synchronize(stream_));
    }
    void clear(Buffer& buffer, std::size_t bytes) override { cuda_.check(cuda_.set(buffer.data(), 0, bytes, stream_)); }
    void finish() override { cuda_.check(cuda_.synchronize(stream_)); }
    void* stream() override { return stream_; }
    std::unique_ptr<Recorded> record(const std::function<void()>& work) override {
        cuda_.check(cuda_.begin_capture(stream_, kThisThread));
        Graph graph = nullptr;
        try {
            work();
        } catch (...) {
            cuda_.end_capture(stream_, &graph); // the capture is void, which its status says once more
            throw;
        }
        cuda_.check(cuda_.end_capture(stream_, &graph));
        Executable executable = nullptr;
        const int status = cuda_.instantiate(&executable, graph, 0);
        cuda_.graph_destroy(graph);
        cuda_.check(status);
        return std::make_unique<RecordedGraph>(cuda_, executable, stream_);
    }
    void drain() noexcept override { cuda_.synchronize(stream_); }

private:
    const Cuda& cuda_;
    int device_;
    Stream stream_ = nullptr;
};

} // namespace

std::unique_ptr<CudaMemory> cuda_memory(int device) {
    return std::make_unique<DeviceMemory>(device);
}

std::string cuda_capability(int device) {
    int major = 0, minor = 0;
    cuda().check(cuda().attribute(&major, kCapabilityMajor, device));
    cuda().check(cuda().attribute(&minor, kCapabilityMinor, device));
    return "sm" + std::to_string(major) + std::to_string(minor);
}

} // namespace diffx::core
