// From latents to images, one at a time and in blended tiles where an image is large, as diffexport/decoding.py does.
#pragma once

#include <span>

#include "backend.hpp"
#include "manifest.hpp"

namespace diffx::core {

/// Decode one sample of a bundle that has a decoder.
void decode(Network& network, const Manifest& manifest, const Decoder& decoder, std::span<const float> latents,
            std::span<float> image);

} // namespace diffx::core
