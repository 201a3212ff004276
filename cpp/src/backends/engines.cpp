#include "backends/engines.hpp"

#include <algorithm>

#include "error.hpp"
#include "files.hpp"
#include "json.hpp"

namespace diffx::core {
namespace {

constexpr int kSchema = 1;
constexpr const char* kBuildAgain = "build it again with `diffx build`";

/// Why an engine of this key cannot run, or nothing.
std::string misfit(const nlohmann::json& key, const Manifest& manifest, const Target& target) {
    const auto differs = [&](const char* name, const std::string& file) {
        const auto listed = manifest.files.find(file);
        return listed == manifest.files.end() || key.at(name) != listed->second.sha256;
    };
    if (differs("graph_sha256", key.at("graph").get<std::string>() + ".onnx")) return "built from another graph";
    if (differs("weights_sha256", "weights.bin")) return "built from other weights";
    if (key.at("version") != target.version)
        return "built for " + target.product + " " + key.at("version").get<std::string>() + ", found " + target.version;
    const auto targets = key.at("targets").get<std::vector<std::string>>();
    if (std::ranges::find(targets, target.capability) == targets.end())
        return "built for " + key.at("targets").dump() + ", found " + target.capability;
    return "";
}

Engine engine_of(const std::filesystem::path& folder, const nlohmann::json& record) {
    Engine engine{folder / "model.engine", record.at("key").at("graph"), {}};
    for (const auto& profile : record.at("key").at("profiles"))
        engine.profiles.push_back({whole<std::size_t>(profile.at("least")), whole<std::size_t>(profile.at("most"))});
    const auto& entry = record.at("engine");
    check_file(engine.file, whole<std::uint64_t>(entry.at("size")), entry.at("sha256"), "its record", kBuildAgain);
    return engine;
}

} // namespace

std::vector<Engine> engines_for(const Bundle& bundle, const Target& target) {
    std::vector<Engine> fitting;
    std::string reason = bundle.path().string() + ": has no engine for " + target.backend;
    std::vector<std::filesystem::path> folders;
    if (std::error_code none; std::filesystem::is_directory(bundle.path() / "engines", none))
        for (const auto& entry : std::filesystem::directory_iterator(bundle.path() / "engines"))
            folders.push_back(entry.path());
    std::ranges::sort(folders);
    for (const auto& folder : folders) {
        const auto path = folder / "engine.json";
        if (!std::filesystem::is_regular_file(path)) continue;
        try {
            const auto record = nlohmann::json::parse(read_text(path));
            if (record.at("schema") != kSchema) throw std::out_of_range("schema version " + record.at("schema").dump());
            const auto& key = record.at("key");
            if (key.at("product") != target.product) continue;
            const std::string problem = misfit(key, bundle.manifest(), target);
            if (problem.empty())
                fitting.push_back(engine_of(folder, record));
            else
                reason = folder.string() + ": " + problem;
        } catch (const nlohmann::json::exception& problem) {
            reason = path.string() + ": not a valid record (" + problem.what() + ")";
        } catch (const std::out_of_range& problem) {
            reason = path.string() + ": not a valid record (" + problem.what() + ")";
        }
    }
    if (fitting.empty())
        throw error(DIFFX_BACKEND_ERROR, reason, "; run `diffx build ", bundle.path().string(), " --backend ",
                    target.backend, "` for ", target.capability);
    return fitting;
}

std::size_t max_batch(const std::vector<Engine>& engines) {
    std::map<std::string, std::size_t> most;
    for (const Engine& engine : engines)
        if (engine.graph == kGraphs[kPlain] || engine.graph == kGraphs[kGuided])
            for (const Profile& profile : engine.profiles)
                most[engine.graph] = std::max(most[engine.graph], profile.most);
    std::size_t common = 0;
    for (const auto& [graph, largest] : most) common = common == 0 ? largest : std::min(common, largest);
    return common;
}

Choice choose(const std::vector<Engine>& engines, const std::string& graph, std::size_t batch) {
    Choice best{nullptr, 0, 0};
    std::size_t most = 0;
    for (const Engine& engine : engines)
        for (std::size_t k = 0; k < engine.profiles.size() && engine.graph == graph; ++k) {
            const Profile& profile = engine.profiles[k];
            most = std::max(most, profile.most);
            const std::size_t size = std::max(batch, profile.least);
            if (batch <= profile.most && (best.engine == nullptr || size < best.batch)) best = {&engine, k, size};
        }
    if (best.engine != nullptr) return best;
    if (most == 0) throw error(DIFFX_BACKEND_ERROR, "there is no engine of ", graph, "; ", kBuildAgain);
    throw error(DIFFX_SHAPE_ERROR, "batch ", batch, ": the engine of ", graph, " takes up to ", most,
                "; sample with --batch ", most);
}

} // namespace diffx::core
