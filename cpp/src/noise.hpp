// Counter-based normal noise, the same numbers as diffexport/noise.py: a number is decided by seed, sample index, draw
// and position, and by nothing else. Philox4x32-10 (Salmon et al. 2011) and Box-Muller in double, rounded to float.
#pragma once

#include <array>
#include <cstdint>
#include <span>

namespace diffx::core {

using Words = std::array<std::uint32_t, 4>;

/// Ten rounds of Philox4x32.
Words philox4x32(Words counter, std::array<std::uint32_t, 2> key);

/// Fill one sample with standard normals. Draw 0 is the start of sampling, draw 1 + k the noise of the plan's row k.
void fill_normal(std::span<float> sample, std::uint64_t seed, std::uint64_t index, std::uint32_t draw);

} // namespace diffx::core
