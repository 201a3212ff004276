#include "files.hpp"

#include <fstream>
#include <span>
#include <vector>

#include "error.hpp"
#include "sha256.hpp"

namespace diffx::core {
namespace {

constexpr std::uintmax_t kLargestText = 1 << 26; // bytes

std::string sha256_of(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary);
    std::vector<char> chunk(1 << 18);
    Sha256 hash;
    while (file.read(chunk.data(), static_cast<std::streamsize>(chunk.size())) || file.gcount() > 0)
        hash.update(std::as_bytes(std::span(chunk).first(static_cast<std::size_t>(file.gcount()))));
    return hash.digest();
}

} // namespace

std::string read_file(const std::filesystem::path& path) {
    std::error_code problem;
    const std::uintmax_t size = std::filesystem::file_size(path, problem);
    std::ifstream file(path, std::ios::binary);
    if (problem || !file)
        throw error(DIFFX_BUNDLE_ERROR, path.string(), ": cannot be read; expected a bundle made by `diffx export`");
    std::string content(size, '\0');
    file.read(content.data(), static_cast<std::streamsize>(size));
    if (file.gcount() != static_cast<std::streamsize>(size))
        throw error(DIFFX_BUNDLE_ERROR, path.string(), ": cut off while it was read");
    return content;
}

std::string read_text(const std::filesystem::path& path) {
    std::error_code problem;
    const std::uintmax_t size = std::filesystem::file_size(path, problem);
    if (!problem && size > kLargestText)
        throw error(DIFFX_BUNDLE_ERROR, path.string(), ": ", size, " bytes, expected at most ", kLargestText);
    return read_file(path);
}

void check_file(const std::filesystem::path& path, std::uint64_t size, const std::string& sha256, const char* author,
                const char* remedy) {
    std::error_code problem;
    if (!std::filesystem::is_regular_file(std::filesystem::symlink_status(path, problem)))
        throw error(DIFFX_BUNDLE_ERROR, path.string(), ": missing or not a regular file; ", remedy);
    const std::uintmax_t found_size = std::filesystem::file_size(path, problem);
    if (found_size != size)
        throw error(DIFFX_BUNDLE_ERROR, path.string(), ": ", found_size, " bytes, ", author, " says ", size,
                    "; the file was changed or cut off");
    const std::string found = sha256_of(path);
    if (found != sha256)
        throw error(DIFFX_BUNDLE_ERROR, path.string(), ": sha256 is ", found.substr(0, 12), "..., ", author, " says ",
                    sha256.substr(0, 12), "...; the file was changed or damaged");
}

} // namespace diffx::core
