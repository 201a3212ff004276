#include "manifest.hpp"

#include <nlohmann/json.hpp>
#include <utility>

#include "error.hpp"

namespace diffx::core {
namespace {

constexpr int kSchema = 1;
constexpr std::int64_t kLargestSample = std::int64_t{1} << 28; // numbers: a gigabyte of float32

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

Defaults defaults_of(const nlohmann::json& entry) {
    Defaults defaults{entry.at("sampler"), entry.at("steps"), entry.at("guidance_scale"), entry.at("batch")};
    if (defaults.steps < 1 || defaults.batch < 1) throw std::out_of_range("defaults: expected steps and batch of at least 1");
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
            .shape = model.at("shape"),
            .size = 0,
            .num_classes = model.at("num_classes"),
            .label_names = model.at("label_names"),
            .defaults = defaults_of(json.at("defaults")),
            .files = {},
        };
        manifest.size = size_of(manifest.shape);
        if (manifest.num_classes < 0) throw std::out_of_range("model.num_classes: expected 0 or more");
        if (!manifest.label_names.empty() && std::cmp_not_equal(manifest.label_names.size(), manifest.num_classes))
            throw std::out_of_range("model.label_names: expected one for each class");
        for (const auto& [name, entry] : json.at("files").items()) {
            check_name(name);
            manifest.files.emplace(name, FileEntry{entry.at("size"), entry.at("sha256")});
        }
        for (const char* name : {"weights.bin", "step.onnx", "step_plain.onnx", "plans.safetensors", "golden.safetensors"})
            if (!manifest.files.contains(name)) throw std::out_of_range(std::string("does not list ") + name);
        return manifest;
    } catch (const nlohmann::json::exception& problem) {
        throw refused(problem.what());
    } catch (const std::out_of_range& problem) {
        throw refused(problem.what());
    }
}

} // namespace diffx::core
