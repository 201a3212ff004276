// Any bytes as a manifest: read, or refused with an Error; nothing else.
#include "error.hpp"
#include "manifest.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    try {
        diffx::core::parse_manifest({reinterpret_cast<const char*>(data), size}, "manifest.json");
    } catch (const diffx::core::Error&) {
        return 0;
    }
    return 0;
}
