// Buffers where a network runs: on the host, or on a CUDA device.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <string>

namespace diffx::core {

/// One allocation, freed with it.
class Buffer {
public:
    virtual ~Buffer() = default;
    virtual void* data() = 0;
};

/// Where buffers are made. What is uploaded may be changed afterwards; what is downloaded is there.
class Memory {
public:
    virtual ~Memory() = default;
    virtual std::unique_ptr<Buffer> allocate(std::size_t bytes) = 0;
    virtual void upload(Buffer& to, const void* from, std::size_t bytes) = 0;
    virtual void download(void* to, Buffer& from, std::size_t bytes) = 0;
    virtual void clear(Buffer& buffer, std::size_t bytes) = 0;
    /// Wait until all of it has been done.
    virtual void finish() = 0;
};

std::unique_ptr<Memory> host_memory();

/// Work of a CUDA stream that was recorded as a graph, freed with it.
class Recorded {
public:
    virtual ~Recorded() = default;
    virtual void launch() = 0;
};

/// Memory of a CUDA device, through the CUDA runtime's library. Throws DIFFX_BACKEND_ERROR where there is no driver.
/// What is uploaded goes by way of pinned memory, so that the host does not wait for the device.
class CudaMemory : public Memory {
public:
    /// A stream, for work in the order of what is uploaded and downloaded here.
    virtual void* stream() = 0;
    /// Record what is put on the stream, in place of doing it.
    virtual std::unique_ptr<Recorded> record(const std::function<void()>& work) = 0;
    /// Wait as finish() does, and let errors pass: for the end of what the stream uses.
    virtual void drain() noexcept = 0;
};
std::unique_ptr<CudaMemory> cuda_memory(int device);

/// Compute capability of a CUDA device, "sm89".
std::string cuda_capability(int device);

} // namespace diffx::core
