#include "picture.hpp"

#include <png.h>

#include <algorithm>
#include <cmath>
#include <filesystem>

namespace {

constexpr std::size_t kTile = 64, kGap = 4; // smaller images are enlarged by a whole factor to about kTile pixels
constexpr unsigned char kPaper = 240;

/// The range of a channel, which is stretched to [-1, 1].
struct Range {
    float low = INFINITY, high = -INFINITY;
    float operator()(float x) const { return (x - low) / std::max(high - low, 1e-12f) * 2 - 1; }
};

unsigned char byte_of(float x) {
    return static_cast<unsigned char>(std::clamp(std::nearbyint((x + 1) * 127.5f), 0.0f, 255.0f));
}

} // namespace

void write_picture(const diffx::Images& images, std::size_t columns, const std::string& path) {
    if (images.shape.size() != 4)
        throw std::runtime_error("a picture needs images of shape (C, H, W); write points with --npy");
    const auto side = [&](std::size_t k) { return static_cast<std::size_t>(images.shape[k]); };
    const std::size_t count = side(0), channels = side(1), height = side(2), width = side(3), plane = height * width;
    const bool plain = channels == 1 || channels == 3;
    const std::size_t shown = channels < 3 ? 1 : 3;
    std::vector<Range> ranges(shown);
    for (std::size_t c = 0; c < shown && !plain; ++c)
        for (std::size_t n = 0; n < count; ++n) {
            const float* first = &images.data[(n * channels + c) * plane];
            const auto [low, high] = std::minmax_element(first, first + plane);
            ranges[c] = {std::min(ranges[c].low, *low), std::max(ranges[c].high, *high)};
        }
    if (columns == 0) columns = static_cast<std::size_t>(std::ceil(std::sqrt(static_cast<double>(count))));
    const std::size_t rows = (count + columns - 1) / columns;
    const auto factor = static_cast<std::size_t>(
        std::max(1.0, std::nearbyint(static_cast<double>(kTile) / static_cast<double>(std::max(height, width)))));
    const std::size_t page_width = columns * (width * factor + kGap) + kGap,
                      page_height = rows * (height * factor + kGap) + kGap;
    std::vector<unsigned char> page(page_width * page_height * 3, kPaper);
    for (std::size_t n = 0; n < count; ++n) {
        const std::size_t left = kGap + n % columns * (width * factor + kGap),
                          top = kGap + n / columns * (height * factor + kGap);
        for (std::size_t y = 0; y < height * factor; ++y)
            for (std::size_t x = 0; x < width * factor; ++x)
                for (std::size_t c = 0; c < 3; ++c) {
                    const std::size_t channel = shown == 1 ? 0 : c;
                    const float number =
                        images.data[(n * channels + channel) * plane + y / factor * width + x / factor];
                    page[((top + y) * page_width + left + x) * 3 + c] =
                        byte_of(plain ? number : ranges[channel](number));
                }
    }
    png_image image{};
    image.version = PNG_IMAGE_VERSION;
    image.width = static_cast<png_uint_32>(page_width);
    image.height = static_cast<png_uint_32>(page_height);
    image.format = PNG_FORMAT_RGB;
    if (png_image_write_to_file(&image, path.c_str(), 0, page.data(), 0, nullptr) == 0)
        throw std::runtime_error(path + ": cannot be written (" + image.message + ")");
}
