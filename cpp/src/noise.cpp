#include "noise.hpp"

#include <cmath>
#include <numbers>

namespace diffx::core {

Words philox4x32(Words counter, std::array<std::uint32_t, 2> key) {
    auto [c0, c1, c2, c3] = counter;
    auto [k0, k1] = key;
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t p0 = std::uint64_t{c0} * 0xD2511F53u, p1 = std::uint64_t{c2} * 0xCD9E8D57u;
        c0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ k0;
        c1 = static_cast<std::uint32_t>(p1);
        c2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ k1;
        c3 = static_cast<std::uint32_t>(p0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {c0, c1, c2, c3};
}

void fill_normal(std::span<float> sample, std::uint64_t seed, std::uint64_t index, std::uint32_t draw) {
    const auto low = [](std::uint64_t value) { return static_cast<std::uint32_t>(value); };
    const auto high = [](std::uint64_t value) { return static_cast<std::uint32_t>(value >> 32); };
    const auto unit = [](std::uint32_t word) { return (word + 0.5) * 0x1p-32; };
    std::array<float, 4> block{};
    for (std::size_t start = 0; start < sample.size(); start += block.size()) {
        const Words words =
            philox4x32({static_cast<std::uint32_t>(start / 4), draw, low(index), high(index)}, {low(seed), high(seed)});
        for (std::size_t pair = 0; pair < 2; ++pair) {
            const double radius = std::sqrt(-2.0 * std::log(unit(words[2 * pair])));
            const double angle = 2.0 * std::numbers::pi * unit(words[2 * pair + 1]);
            block[2 * pair] = static_cast<float>(radius * std::cos(angle));
            block[2 * pair + 1] = static_cast<float>(radius * std::sin(angle));
        }
        for (std::size_t k = 0; k < block.size() && start + k < sample.size(); ++k) sample[start + k] = block[k];
    }
}

} // namespace diffx::core
