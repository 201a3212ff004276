// An opened bundle, whose files have been checked against its manifest.
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "backend.hpp"
#include "manifest.hpp"
#include "safetensors.hpp"

namespace diffx::core {

/// The numbers of a sampler, ready to run; see diffexport/plan.py.
struct Plan {
    std::vector<Row> rows;
    float x_scale;
};

class Bundle {
public:
    /// Open a bundle and check every file. Throws DIFFX_BUNDLE_ERROR.
    explicit Bundle(std::filesystem::path path);

    const std::filesystem::path& path() const { return path_; }
    const Manifest& manifest() const { return manifest_; }

    /// A ready-made plan, its guidance column set to guidance_scale. Throws DIFFX_PLAN_ERROR.
    Plan plan(const std::string& sampler, int steps, double guidance_scale) const;

    /// The golden cases.
    Tensors golden() const { return tensors("golden.safetensors"); }

    /// The graphs on a backend, loaded once for all samplers that ask with the same options.
    std::shared_ptr<Network> network(const std::string& backend, const Options& options) const;

private:
    Tensors tensors(const char* name) const;

    std::filesystem::path path_;
    Manifest manifest_;
    Tensors plans_;
    mutable std::mutex mutex_;
    mutable std::map<std::pair<std::string, Options>, std::weak_ptr<Network>> networks_;
};

} // namespace diffx::core
