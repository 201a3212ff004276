#include "decoding.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace diffx::core {
namespace {

constexpr std::size_t kOverlap = 4; // tiles share at least their side divided by this

/// What one tile covers of an axis: its first latent, and the weight of each of its pixels.
struct Span {
    std::size_t start = 0;
    std::vector<float> weight;
};

/// The tiles along an axis, all of the same size, the first and last at its ends. Weights of a pixel add up to 1.
std::vector<Span> spans(std::size_t side, std::size_t tile, std::size_t upscale) {
    const std::size_t overlap = tile / kOverlap, pixels = tile * upscale;
    const std::size_t count = 1 + (side - tile + tile - overlap - 1) / (tile - overlap);
    const double step = count > 1 ? static_cast<double>(side - tile) / static_cast<double>(count - 1) : 0;
    std::vector<std::size_t> starts(count);
    std::vector<double> total(side * upscale), ramp(count * pixels);
    for (std::size_t k = 0; k < count; ++k) {
        starts[k] = static_cast<std::size_t>(std::nearbyint(static_cast<double>(k) * step));
        for (std::size_t p = 0; p < pixels; ++p) {
            const double none = std::numeric_limits<double>::infinity();
            const double rising = k > 0 ? static_cast<double>(p) + 0.5 : none;
            const double falling = k + 1 < count ? static_cast<double>(pixels - p) - 0.5 : none;
            ramp[k * pixels + p] = std::min(std::min(rising, falling) / static_cast<double>(overlap * upscale), 1.0);
            total[starts[k] * upscale + p] += ramp[k * pixels + p];
        }
    }
    std::vector<Span> found(count);
    for (std::size_t k = 0; k < count; ++k) {
        found[k] = {starts[k], std::vector<float>(pixels)};
        for (std::size_t p = 0; p < pixels; ++p)
            found[k].weight[p] = static_cast<float>(ramp[k * pixels + p] / total[starts[k] * upscale + p]);
    }
    return found;
}

} // namespace

void decode(Network& network, const Manifest& manifest, const Decoder& decoder, std::span<const float> latents,
            std::span<float> image) {
    const auto side = [&](std::size_t k) { return static_cast<std::size_t>(manifest.shape[k]); };
    const std::size_t depth = side(0), height = side(1), width = side(2);
    const std::size_t upscale = decoder.upscale, channels = decoder.channels;
    const std::size_t tile = decoder.tile / upscale;
    const std::size_t rows = tile == 0 ? height : std::min(tile, height),
                      columns = tile == 0 ? width : std::min(tile, width);
    const std::size_t page = width * upscale, band = rows * upscale, stripe = columns * upscale;
    std::vector<float> part(depth * rows * columns), decoded(channels * band * stripe);
    std::ranges::fill(image, 0.0f);
    for (const Span& row : spans(height, rows, upscale))
        for (const Span& column : spans(width, columns, upscale)) {
            for (std::size_t channel = 0; channel < depth; ++channel)
                for (std::size_t y = 0; y < rows; ++y) {
                    const auto line =
                        latents.subspan((channel * height + row.start + y) * width + column.start, columns);
                    std::ranges::copy(line, part.begin() + static_cast<std::ptrdiff_t>((channel * rows + y) * columns));
                }
            network.decode(part, {static_cast<std::int64_t>(rows), static_cast<std::int64_t>(columns)}, decoded);
            for (std::size_t channel = 0; channel < channels; ++channel)
                for (std::size_t y = 0; y < band; ++y) {
                    const float* from = &decoded[(channel * band + y) * stripe];
                    float* to = &image[((channel * height + row.start) * upscale + y) * page + column.start * upscale];
                    for (std::size_t x = 0; x < stripe; ++x) to[x] += from[x] * (row.weight[y] * column.weight[x]);
                }
        }
}

} // namespace diffx::core
