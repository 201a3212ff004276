// Images side by side as a PNG, laid out as diffexport/pictures.py does, without captions.
#pragma once

#include <string>

#include "diffx.hpp"

/// Write images in [-1, 1] of shape (N, C, H, W): one channel is gray, three are RGB, of any other number (latents) the
/// first three are shown, each stretched to its own range.
///
/// columns: images in a row; 0: about a square. Throws std::runtime_error where they cannot be drawn or written.
void write_picture(const diffx::Images& images, std::size_t columns, const std::string& path);
