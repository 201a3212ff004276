// Buffers where a network runs: on the host, or on a CUDA device.
#pragma once

#include <cstddef>
#include <memory>

namespace diffx::core {

/// One allocation, freed with it.
class Buffer {
public:
    virtual ~Buffer() = default;
    virtual void* data() = 0;
};

/// Where buffers are made. upload and download have been done when they return.
class Memory {
public:
    virtual ~Memory() = default;
    virtual std::unique_ptr<Buffer> allocate(std::size_t bytes) = 0;
    virtual void upload(Buffer& to, const void* from, std::size_t bytes) = 0;
    virtual void download(void* to, Buffer& from, std::size_t bytes) = 0;
    virtual void clear(Buffer& buffer, std::size_t bytes) = 0;
};

std::unique_ptr<Memory> host_memory();

/// Memory of a CUDA device, through the CUDA runtime's library. Throws DIFFX_BACKEND_ERROR where there is no driver.
std::unique_ptr<Memory> cuda_memory(int device);

} // namespace diffx::core
