// Any bytes as a file of tensors: read, or refused with an Error; nothing else.
#include "error.hpp"
#include "safetensors.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    try {
        diffx::core::parse_safetensors({reinterpret_cast<const std::byte*>(data), size}, "plans.safetensors");
    } catch (const diffx::core::Error&) {
        return 0;
    }
    return 0;
}
