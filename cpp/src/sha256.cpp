#include "sha256.hpp"

#include <algorithm>
#include <bit>

#ifdef __x86_64__
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace diffx::core {
namespace {

constexpr std::array<std::uint32_t, 64> kConstants = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

std::uint32_t word_at(const std::byte* bytes) {
    std::uint32_t word = 0;
    for (int k = 0; k < 4; ++k) word = word << 8 | std::to_integer<std::uint32_t>(bytes[k]);
    return word;
}

void compress_block(Sha256::State& state, const std::byte* block) {
    std::array<std::uint32_t, 64> w{};
    for (std::size_t t = 0; t < 16; ++t) w[t] = word_at(block + 4 * t);
    for (std::size_t t = 16; t < 64; ++t) {
        const std::uint32_t s0 = std::rotr(w[t - 15], 7) ^ std::rotr(w[t - 15], 18) ^ w[t - 15] >> 3;
        const std::uint32_t s1 = std::rotr(w[t - 2], 17) ^ std::rotr(w[t - 2], 19) ^ w[t - 2] >> 10;
        w[t] = w[t - 16] + s0 + w[t - 7] + s1;
    }
    auto [a, b, c, d, e, f, g, h] = state;
    for (std::size_t t = 0; t < 64; ++t) {
        const std::uint32_t t1 =
            h + (std::rotr(e, 6) ^ std::rotr(e, 11) ^ std::rotr(e, 25)) + ((e & f) ^ (~e & g)) + kConstants[t] + w[t];
        const std::uint32_t t2 =
            (std::rotr(a, 2) ^ std::rotr(a, 13) ^ std::rotr(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
        h = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
    }
    const std::array<std::uint32_t, 8> next = {a, b, c, d, e, f, g, h};
    for (std::size_t k = 0; k < 8; ++k) state[k] += next[k];
}

void compress_portably(Sha256::State& state, const std::byte* data, std::size_t blocks) {
    for (std::size_t k = 0; k < blocks; ++k) compress_block(state, data + 64 * k);
}

#ifdef __x86_64__

bool has_instructions() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (__get_cpuid(1, &eax, &ebx, &ecx, &edx) == 0 || (ecx & bit_SSE4_1) == 0) return false;
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (ebx & bit_SHA) != 0;
}

/// The state lies in two registers as the instructions want it, (a, b, e, f) and (c, d, g, h) from the top down; four
/// words of the schedule in each of four others.
__attribute__((target("sha,sse4.1"))) void compress_by_instructions(Sha256::State& state, const std::byte* data,
                                                                    std::size_t blocks) {
    const auto load = [](const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); };
    const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
    const __m128i cdab = _mm_shuffle_epi32(load(state.data()), 0xb1);
    const __m128i efgh = _mm_shuffle_epi32(load(state.data() + 4), 0x1b);
    __m128i abef = _mm_alignr_epi8(cdab, efgh, 8), cdgh = _mm_blend_epi16(efgh, cdab, 0xf0);
    for (; blocks > 0; --blocks, data += 64) {
        const __m128i abef_before = abef, cdgh_before = cdgh;
        __m128i w[4];
        for (int k = 0; k < 4; ++k) w[k] = _mm_shuffle_epi8(load(data + std::ptrdiff_t{16} * k), big_endian);
        for (int t = 0; t < 16; ++t) { // four rounds each
            const __m128i sum = _mm_add_epi32(w[t % 4], load(kConstants.data() + std::ptrdiff_t{4} * t));
            cdgh = _mm_sha256rnds2_epu32(cdgh, abef, sum);
            abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(sum, 0x0e));
            const __m128i late = w[(t + 3) % 4], middle = _mm_alignr_epi8(late, w[(t + 2) % 4], 4);
            w[t % 4] =
                _mm_sha256msg2_epu32(_mm_add_epi32(_mm_sha256msg1_epu32(w[t % 4], w[(t + 1) % 4]), middle), late);
        }
        abef = _mm_add_epi32(abef, abef_before);
        cdgh = _mm_add_epi32(cdgh, cdgh_before);
    }
    const __m128i feba = _mm_shuffle_epi32(abef, 0x1b), dchg = _mm_shuffle_epi32(cdgh, 0xb1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(state.data()), _mm_blend_epi16(feba, dchg, 0xf0));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(state.data() + 4), _mm_alignr_epi8(dchg, feba, 8));
}

#endif

} // namespace

Sha256::Sha256(bool portable) : compress_(compress_portably) {
#ifdef __x86_64__
    static const bool found = has_instructions();
    if (found && !portable) compress_ = compress_by_instructions;
#else
    static_cast<void>(portable);
#endif
}

void Sha256::update(std::span<const std::byte> data) {
    std::size_t filled = length_ % 64;
    length_ += data.size();
    if (filled != 0) {
        const std::size_t taken = std::min(64 - filled, data.size());
        std::copy_n(data.begin(), taken, pending_.begin() + static_cast<std::ptrdiff_t>(filled));
        data = data.subspan(taken);
        if (filled + taken < 64) return;
        compress_(state_, pending_.data(), 1);
    }
    compress_(state_, data.data(), data.size() / 64);
    std::ranges::copy(data.last(data.size() % 64), pending_.begin());
}

std::string Sha256::digest() {
    const std::uint64_t bits = length_ * 8;
    std::array<std::byte, 72> tail{std::byte{0x80}};
    const std::size_t padding = (119 - length_ % 64) % 64 + 1; // so that padding and eight bytes of length end a block
    for (std::size_t k = 0; k < 8; ++k) tail[padding + k] = static_cast<std::byte>(bits >> (56 - 8 * k));
    update(std::span(tail).first(padding + 8));
    std::string hex;
    for (std::uint32_t word : state_)
        for (int shift = 28; shift >= 0; shift -= 4) hex += "0123456789abcdef"[word >> shift & 15];
    return hex;
}

} // namespace diffx::core
