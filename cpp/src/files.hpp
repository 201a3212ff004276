// Files of a bundle, read whole or hashed.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

namespace diffx::core {

/// A file of JSON or of small tensors. Throws DIFFX_BUNDLE_ERROR where it cannot be read or is too large to be one.
std::string read_text(const std::filesystem::path& path);

/// A file of any size. Throws DIFFX_BUNDLE_ERROR.
std::string read_file(const std::filesystem::path& path);

/// See that a file is there, a regular one, and has this size and hash. Throws DIFFX_BUNDLE_ERROR.
///
/// author: who says so, "the manifest"; remedy: what to do where the file is missing.
void check_file(const std::filesystem::path& path, std::uint64_t size, const std::string& sha256, const char* author,
                const char* remedy);

} // namespace diffx::core
