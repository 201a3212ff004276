#include "safetensors.hpp"

#include <bit>
#include <cstring>

#include "error.hpp"
#include "json.hpp"

namespace diffx::core {
namespace {

static_assert(std::endian::native == std::endian::little, "safetensors are little endian, and so must the machine be");

/// Number of elements of a shape, refused where it is negative or does not fit the bytes that the file has.
std::size_t count_of(const std::vector<std::int64_t>& shape, std::size_t limit) {
    std::size_t count = 1;
    for (std::int64_t side : shape) {
        if (side < 0) throw std::out_of_range("a negative side");
        if (side != 0 && count > limit / static_cast<std::size_t>(side))
            throw std::out_of_range("more than the file holds");
        count *= static_cast<std::size_t>(side);
    }
    return count;
}

template <typename Number>
std::vector<Number> copied(std::span<const std::byte> bytes, std::size_t count) {
    if (bytes.size() != count * sizeof(Number)) throw std::out_of_range("its shape and its bytes differ");
    std::vector<Number> numbers(count);
    if (count != 0) std::memcpy(numbers.data(), bytes.data(), bytes.size());
    return numbers;
}

Tensor tensor_of(const nlohmann::json& entry, std::span<const std::byte> data) {
    Tensor tensor;
    tensor.shape = whole_numbers<std::int64_t>(entry.at("shape"));
    const auto offsets = whole_numbers<std::uint64_t>(entry.at("data_offsets"));
    if (offsets.size() != 2 || offsets[0] > offsets[1] || offsets[1] > data.size())
        throw std::out_of_range("it lies outside the file");
    const auto bytes = data.subspan(offsets[0], offsets[1] - offsets[0]);
    const std::size_t count = count_of(tensor.shape, data.size());
    const auto kind = entry.at("dtype").get<std::string>();
    if (kind == "F32")
        tensor.floats = copied<float>(bytes, count);
    else if (kind == "I64")
        tensor.integers = copied<std::int64_t>(bytes, count);
    else
        throw std::out_of_range("of type " + kind + ", expected F32 or I64");
    return tensor;
}

} // namespace

Tensors parse_safetensors(std::span<const std::byte> file, const std::string& name) {
    std::uint64_t length = 0;
    if (file.size() < sizeof length) throw error(DIFFX_BUNDLE_ERROR, name, ": cut off; expected a safetensors file");
    std::memcpy(&length, file.data(), sizeof length);
    if (length > file.size() - sizeof length)
        throw error(DIFFX_BUNDLE_ERROR, name, ": its header has ", length, " bytes, the file only ", file.size());
    const auto header = file.subspan(sizeof length, length);
    const auto data = file.subspan(sizeof length + length);
    const auto* text = reinterpret_cast<const char*>(header.data());
    Tensors tensors;
    std::string current = "the header";
    try {
        const auto json = nlohmann::json::parse(text, text + header.size());
        for (const auto& [key, entry] : json.items()) {
            if (key == "__metadata__") continue;
            current = "tensor " + key;
            tensors.emplace(key, tensor_of(entry, data));
        }
    } catch (const nlohmann::json::exception& problem) {
        throw error(DIFFX_BUNDLE_ERROR, name, ": ", current, " is not as safetensors have it (", problem.what(), ")");
    } catch (const std::out_of_range& problem) {
        throw error(DIFFX_BUNDLE_ERROR, name, ": ", current, ": ", problem.what());
    }
    return tensors;
}

} // namespace diffx::core
