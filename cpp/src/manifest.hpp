// What manifest.json says of a bundle, as far as a run needs it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace diffx::core {

struct FileEntry {
    std::uint64_t size;
    std::string sha256;
};

struct Defaults {
    std::string sampler;
    int steps = 0;
    double guidance_scale = 1;
    int batch = 0;
};

/// A decoder of latents to images.
struct Decoder {
    std::size_t upscale;  // pixels on a side for each latent
    std::size_t channels; // of the images
    std::size_t tile;     // pixels on a side of the tiles in which larger images are decoded; 0: decoded whole
};

struct Manifest {
    std::string name;
    std::string precision;
    std::vector<std::int64_t> shape; // of one sample, (C, H, W) or (D)
    std::size_t size = 0;            // numbers in one sample
    std::int64_t num_classes = 0;    // 0 for a model without labels
    bool has_null = true;            // it knows a null label beside those; without one there is no guidance
    std::vector<std::string> label_names;
    Defaults defaults;
    std::optional<Decoder> decoder;
    std::vector<std::int64_t> image_shape; // of what is returned: the sample, or what the decoder makes of it
    std::size_t image_size = 0;
    std::map<std::string, FileEntry> files;
};

/// Read the text of a manifest. Throws DIFFX_BUNDLE_ERROR, whose message begins with path.
Manifest parse_manifest(std::string_view text, const std::string& path);

} // namespace diffx::core
