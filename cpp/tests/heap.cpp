// Loaded before a program (LD_PRELOAD): the most bytes that the library and its program hold at once in blocks of a
// page and more, leaving out those of every runtime. Written to stderr when the program ends.
#include <dlfcn.h>
#include <malloc.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>

namespace {

constexpr std::size_t kPage = 4096;

struct Block {
    void* address;
    std::size_t size;
};

std::mutex mutex;
std::array<Block, 4096> blocks{};
std::size_t count = 0, held = 0, most = 0;

bool is_ours(void* caller) {
    Dl_info module;
    return dladdr(caller, &module) != 0 && std::strstr(module.dli_fname, "diffx-") != nullptr;
}

void* allocate(std::size_t size, void* caller) {
    void* address = std::malloc(size);
    if (address == nullptr) throw std::bad_alloc();
    if (size >= kPage && is_ours(caller)) {
        const std::scoped_lock lock(mutex);
        blocks.at(count++) = {address, size};
        held += size;
        most = std::max(most, held);
    }
    return address;
}

void release(void* address) {
    if (address != nullptr && malloc_usable_size(address) >= kPage) {
        const std::scoped_lock lock(mutex);
        auto* const end = blocks.begin() + count;
        auto* const found = std::find_if(blocks.begin(), end, [&](const Block& b) { return b.address == address; });
        if (found != end) {
            held -= found->size;
            *found = blocks.at(--count);
        }
    }
    std::free(address);
}

struct Report {
    ~Report() { std::fprintf(stderr, "peak %zu\n", most); }
} report;

} // namespace

void* operator new(std::size_t size) {
    return allocate(size, __builtin_return_address(0));
}
void* operator new[](std::size_t size) {
    return allocate(size, __builtin_return_address(0));
}
void operator delete(void* address) noexcept {
    release(address);
}
void operator delete[](void* address) noexcept {
    release(address);
}
void operator delete(void* address, std::size_t) noexcept {
    release(address);
}
void operator delete[](void* address, std::size_t) noexcept {
    release(address);
}
