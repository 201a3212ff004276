#include "manifest.hpp"

#include "error.hpp"
#include "json.hpp"

namespace diffx::core {
namespace {

constexpr int kSchema = 1;
constexpr std::int64_t kLargestSample = std::int64_t{1} << 28; // numbers: a gigabyte of float32
constexpr std::int64_t kLargestSide = 1 << 16;

std::size_t size_of(const std::vector<std::int64_t>& shape) {
    if (shape.size() != 1 && shape.size() != 3) throw std::out_of_range("model.shape: expected (C, H, W) or (D)");
    std::int64_t size = 1;
    for (std::int64_t side : shape) {
        if (side < 1 || size > kLargestSample / side)
            throw std::out_of_range("model.shape: expected sides of at least 1 and at most 2^28 numbers");
        size *= side;
    }
    return static_cast<std::size_t>(size);
}

std::optional<Decoder> decoder_of(const nlohmann::json& entry) {
    if (entry.is_null()) return std::nullopt;
    const auto number = [&entry](const char* name) {
        const auto value = whole<std::int64_t>(entry.at(name));
        if (value < 1 || value > kLargestSide)
            throw std::out_of_range(std::string("decoder.") + name + ": expected 1..65536");
        return static_cast<std::size_t>(value);
    };
    return Decoder{number("upscale"), number("channels"), entry.at("tile").is_null() ? 0 : number("tile")};
}

std::vector<std::int64_t> image_shape(const std::vector<std::int64_t>& shape, const std::optional<Decoder>& decoder) {
    if (!decoder) return shape;
    if (shape.size() != 3) throw std::out_of_range("decoder: expected latents of shape (C, H, W)");
    const auto upscale = static_cast<std::int64_t>(decoder->upscale);
    if (decoder->tile % decoder->upscale != 0 || (decoder->tile != 0 && decoder->tile / decoder->upscale < 4))
        throw std::out_of_range("decoder.tile: expected a multiple of upscale, at least four times it");
    return {static_cast<std::int64_t>(decoder->channels), shape[1] * upscale, shape[2] * upscale};
}

Defaults defaults_of(const nlohmann::json& entry) {
    Defaults defaults{entry.at("sampler"), whole<int>(entry.at("steps")), entry.at("guidance_scale"),
                      whole<int>(entry.at("batch"))};
    if (defaults.steps < 1 || defaults.batch < 1)
        throw std::out_of_range("defaults: expected steps and batch of at least 1");
    return defaults;
}

void check_name(const std::string& name) {
    if (name.empty() || name == "." || name == ".." || name.find_first_of(std::string("/\\\0", 3)) != std::string::npos)
        throw std::out_of_range("lists the file '" + name + "', expected a plain file name");
}

} // namespace

Manifest parse_manifest(std::string_view text, const std::string& path) {
    const auto refused = [&path](const char* problem) {
        return error(DIFFX_BUNDLE_ERROR, path, ": not a valid manifest (", problem, "); export the model again");
    };
    try {
        const auto json = nlohmann::json::parse(text);
        const auto& schema = json.at("schema");
        if (schema != kSchema)
            throw error(DIFFX_BUNDLE_ERROR, path, ": schema version ", schema.dump(), ", this diffx reads ", kSchema,
                        "; export the model again");
        const auto& model = json.at("model");
        Manifest manifest{
            .name = json.at("name"),
            .precision = json.at("precision"),
            .shape = whole_numbers<std::int64_t>(model.at("shape")),
            .size = 0,
            .num_classes = whole<std::int64_t>(model.at("num_classes")),
            .has_null = model.value("has_null", true),
            .label_names = model.at("label_names"),
            .defaults = defaults_of(json.at("defaults")),
            .decoder = decoder_of(json.value("decoder", nlohmann::json())),
            .image_shape = {},
            .image_size = 0,
            .files = {},
        };
        manifest.size = size_of(manifest.shape);
        manifest.image_shape = image_shape(manifest.shape, manifest.decoder);
        manifest.image_size = size_of(manifest.image_shape);
        if (manifest.num_classes < 0) throw std::out_of_range("model.num_classes: expected 0 or more");
        if (!manifest.label_names.empty() && std::cmp_not_equal(manifest.label_names.size(), manifest.num_classes))
            throw std::out_of_range("model.label_names: expected one for each class");
        for (const auto& [name, entry] : json.at("files").items()) {
            check_name(name);
            manifest.files.emplace(name, FileEntry{whole<std::uint64_t>(entry.at("size")), entry.at("sha256")});
        }
        for (const char* name :
             {"weights.bin", "step.onnx", "step_plain.onnx", "plans.safetensors", "golden.safetensors"})
            if (!manifest.files.contains(name)) throw std::out_of_range(std::string("does not list ") + name);
        if (manifest.decoder && !manifest.files.contains("decoder.onnx"))
            throw std::out_of_range("does not list decoder.onnx");
        return manifest;
    } catch (const nlohmann::json::exception& problem) {
        throw refused(problem.what());
    } catch (const std::out_of_range& problem) {
        throw refused(problem.what());
    }
}

} // namespace diffx::core
