// SHA-256 (FIPS 180-4), for the check of a bundle's files against its manifest.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace diffx::core {

class Sha256 {
public:
    /// portable: without the processor's own instructions for it, which are several times as fast.
    explicit Sha256(bool portable = false);
    void update(std::span<const std::byte> data);
    /// The digest in hexadecimal; nothing may be added afterwards.
    std::string digest();

    using State = std::array<std::uint32_t, 8>;

private:
    /// Take in blocks of 64 bytes.
    void (*compress_)(State& state, const std::byte* data, std::size_t blocks);

    State state_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    std::array<std::byte, 64> pending_{};
    std::uint64_t length_ = 0;
};

} // namespace diffx::core
