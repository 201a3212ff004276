// The few functions of the CUDA runtime that buffers need, looked up in its library when a CUDA device is asked for.
#include "backends/library.hpp"
#include "backends/memory.hpp"
#include "error.hpp"

namespace diffx::core {
namespace {

// As cuda_runtime_api.h has them; a status is an int, 0 for success.
constexpr int kToDevice = 1, kToHost = 2;                   // cudaMemcpyKind
constexpr int kCapabilityMajor = 75, kCapabilityMinor = 76; // cudaDeviceAttr
using Stream = struct CUstream_st*;

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

class DeviceBuffer final : public Buffer {
public:
    DeviceBuffer(const Cuda& cuda, std::size_t bytes) : cuda_(cuda) { cuda_.check(cuda_.allocate(&data_, bytes)); }
    DeviceBuffer(const DeviceBuffer&) = delete;
    DeviceBuffer& operator=(const DeviceBuffer&) = delete;
    ~DeviceBuffer() override { cuda_.free(data_); }
    void* data() override { return data_; }

private:
    const Cuda& cuda_;
    void* data_ = nullptr;
};

class DeviceMemory final : public CudaMemory {
public:
    explicit DeviceMemory(int device) : cuda_(cuda()) {
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
        cuda_.check(
            cuda_.copy(to.data(), from, bytes, kToDevice, stream_)); // from pageable memory: read when it returns
    }
    void download(void* to, Buffer& from, std::size_t bytes) override {
        cuda_.check(cuda_.copy(to, from.data(), bytes, kToHost, stream_));
        cuda_.check(cuda_.synchronize(stream_));
    }
    void clear(Buffer& buffer, std::size_t bytes) override { cuda_.check(cuda_.set(buffer.data(), 0, bytes, stream_)); }
    void finish() override { cuda_.check(cuda_.synchronize(stream_)); }
    void* stream() override { return stream_; }

private:
    const Cuda& cuda_;
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
