#include "bundle.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

#include "error.hpp"
#include "files.hpp"

namespace diffx::core {
namespace {

/// The plans that there are, for people: "ddim:5,10,20 heun:5,10".
std::string known_plans(const Tensors& plans) {
    std::map<std::string, std::map<std::size_t, std::string>> samplers; // steps in the order of their numbers
    for (const auto& [key, tensor] : plans) {
        const std::size_t dot = key.rfind('.');
        if (dot != std::string::npos && plans.contains(key + ".x_scale"))
            samplers[key.substr(0, dot)][tensor.floats.size()] = key.substr(dot + 1);
    }
    std::string text;
    for (const auto& [sampler, numbers] : samplers) {
        text.append(text.empty() ? "" : " ").append(sampler);
        char mark = ':';
        for (const auto& [size, steps] : numbers) text.append(1, std::exchange(mark, ',')).append(steps);
    }
    return text;
}

} // namespace

Bundle::Bundle(std::filesystem::path path) : path_(std::move(path)) {
    std::error_code ignored;
    if (!std::filesystem::is_directory(path_, ignored))
        throw error(DIFFX_BUNDLE_ERROR, path_.string(), ": ",
                    std::filesystem::exists(path_, ignored) ? "not a folder" : "no such folder",
                    "; expected a bundle made by `diffx export`");
    const auto manifest = path_ / "manifest.json";
    manifest_ = parse_manifest(read_text(manifest), manifest.string());
    for (const auto& [name, entry] : manifest_.files)
        check_file(path_ / name, entry.size, entry.sha256, "the manifest",
                   "copy the whole bundle again or export the model again");
    plans_ = tensors("plans.safetensors");
}

Tensors Bundle::tensors(const char* name) const {
    const auto path = path_ / name;
    const std::string file = read_text(path);
    return parse_safetensors(std::as_bytes(std::span(file)), path.string());
}

Plan Bundle::plan(const std::string& sampler, int steps, double guidance_scale) const {
    const std::string key = sampler + "." + std::to_string(steps);
    const auto rows = plans_.find(key), scale = plans_.find(key + ".x_scale");
    if (rows == plans_.end() || scale == plans_.end()) {
        throw error(DIFFX_PLAN_ERROR, "plan ", sampler, ":", steps, ": the bundle has ", known_plans(plans_),
                    "; add this one with `diffx export CKPT --plan ", sampler, ":", steps, "`");
    }
    if (!std::isfinite(guidance_scale))
        throw error(DIFFX_PLAN_ERROR, "guidance_scale ", guidance_scale, ": expected a finite number");
    if (guidance_scale != 1 && (manifest_.num_classes == 0 || !manifest_.has_null))
        throw error(DIFFX_PLAN_ERROR, "guidance_scale ", guidance_scale, ": this model has no ",
                    manifest_.num_classes == 0 ? "labels" : "null label", ", so only 1 (off) is possible");
    const auto& table = rows->second.floats;
    const auto finite = [](float number) { return std::isfinite(number); };
    const auto& shape = rows->second.shape;
    if (table.empty() || shape.size() != 2 || std::cmp_not_equal(shape[1], kColumns) ||
        scale->second.floats.size() != 1 || !std::ranges::all_of(table, finite) || !finite(scale->second.floats[0]))
        throw error(DIFFX_BUNDLE_ERROR, (path_ / "plans.safetensors").string(), ": plan ", sampler, ":", steps,
                    " is not a table of finite numbers with ", kColumns, " columns; export the model again");
    Plan plan{std::vector<Row>(table.size() / kColumns), scale->second.floats[0]};
    for (std::size_t k = 0; k < plan.rows.size(); ++k) {
        std::copy_n(table.begin() + static_cast<std::ptrdiff_t>(k * kColumns), kColumns, plan.rows[k].begin());
        plan.rows[k][kGuidance] = static_cast<float>(guidance_scale);
    }
    return plan;
}

std::shared_ptr<Network> Bundle::network(const std::string& backend, const Options& options) const {
    const std::scoped_lock lock(mutex_);
    auto& kept = networks_[{backend, options}];
    auto network = kept.lock();
    if (!network) kept = network = open_network(*this, backend, options);
    return network;
}

} // namespace diffx::core
