// The few functions of the CUDA runtime that buffers need, looked up in its library when a CUDA device is asked for.
#include <string>

#include "backends/library.hpp"
#include "backends/memory.hpp"
#include "error.hpp"

namespace diffx::core {
namespace {

enum class Direction : int { ToDevice = 1, ToHost = 2 }; // cudaMemcpyKind

/// As cuda_runtime_api.h declares them; cudaError_t is an int, 0 for success.
class Cuda {
public:
    Cuda()
        : library_("cuda", "DIFFX_CUDART_LIBRARY", DIFFX_CUDART_LIBRARY, "install the CUDA runtime"),
          set_device(library_.symbol<int(int)>("cudaSetDevice")),
          allocate(library_.symbol<int(void**, std::size_t)>("cudaMalloc")),
          free(library_.symbol<int(void*)>("cudaFree")),
          copy(library_.symbol<int(void*, const void*, std::size_t, int)>("cudaMemcpy")),
          set(library_.symbol<int(void*, int, std::size_t)>("cudaMemset")),
          message_(library_.symbol<const char*(int)>("cudaGetErrorString")) {}

    void check(int status) const {
        if (status != 0) throw error(DIFFX_BACKEND_ERROR, "CUDA: ", message_(status), " (error ", status, ")");
    }

private:
    Library library_;

public:
    int (*set_device)(int);
    int (*allocate)(void**, std::size_t);
    int (*free)(void*);
    int (*copy)(void*, const void*, std::size_t, int);
    int (*set)(void*, int, std::size_t);

private:
    const char* (*message_)(int);
};

class CudaBuffer final : public Buffer {
public:
    CudaBuffer(const Cuda& cuda, std::size_t bytes) : cuda_(cuda) { cuda_.check(cuda_.allocate(&data_, bytes)); }
    CudaBuffer(const CudaBuffer&) = delete;
    CudaBuffer& operator=(const CudaBuffer&) = delete;
    ~CudaBuffer() override { cuda_.free(data_); }
    void* data() override { return data_; }

private:
    const Cuda& cuda_;
    void* data_ = nullptr;
};

class CudaMemory final : public Memory {
public:
    CudaMemory(const Cuda& cuda, int device) : cuda_(cuda) { cuda_.check(cuda_.set_device(device)); }
    std::unique_ptr<Buffer> allocate(std::size_t bytes) override { return std::make_unique<CudaBuffer>(cuda_, bytes); }
    void upload(Buffer& to, const void* from, std::size_t bytes) override {
        cuda_.check(cuda_.copy(to.data(), from, bytes, static_cast<int>(Direction::ToDevice)));
    }
    void download(void* to, Buffer& from, std::size_t bytes) override {
        cuda_.check(cuda_.copy(to, from.data(), bytes, static_cast<int>(Direction::ToHost)));
    }
    void clear(Buffer& buffer, std::size_t bytes) override { cuda_.check(cuda_.set(buffer.data(), 0, bytes)); }

private:
    const Cuda& cuda_;
};

} // namespace

std::unique_ptr<Memory> cuda_memory(int device) {
    static const Cuda cuda;
    return std::make_unique<CudaMemory>(cuda, device);
}

} // namespace diffx::core
