// The safetensors format: an eight-byte header length, a JSON header, then the tensors' bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

namespace diffx::core {

/// A tensor of float32 or int64 in C order; one of the two vectors is empty.
struct Tensor {
    std::vector<std::int64_t> shape;
    std::vector<float> floats;
    std::vector<std::int64_t> integers;
};

using Tensors = std::map<std::string, Tensor, std::less<>>;

/// Read a whole file. Throws DIFFX_BUNDLE_ERROR, whose message begins with name, for anything but F32 and I64 tensors
/// that lie within the file and have the size that their shape says.
Tensors parse_safetensors(std::span<const std::byte> file, const std::string& name);

} // namespace diffx::core
