#include "backends/memory.hpp"

#include <cstring>
#include <vector>

namespace diffx::core {
namespace {

class HostBuffer final : public Buffer {
public:
    explicit HostBuffer(std::size_t bytes) : bytes_(bytes) {}
    void* data() override { return bytes_.data(); }

private:
    std::vector<std::byte> bytes_;
};

class HostMemory final : public Memory {
public:
    std::unique_ptr<Buffer> allocate(std::size_t bytes) override { return std::make_unique<HostBuffer>(bytes); }
    void upload(Buffer& to, const void* from, std::size_t bytes) override { std::memcpy(to.data(), from, bytes); }
    void download(void* to, Buffer& from, std::size_t bytes) override { std::memcpy(to, from.data(), bytes); }
    void clear(Buffer& buffer, std::size_t bytes) override { std::memset(buffer.data(), 0, bytes); }
    void finish() override {}
};

} // namespace

std::unique_ptr<Memory> host_memory() {
    return std::make_unique<HostMemory>();
}

} // namespace diffx::core
