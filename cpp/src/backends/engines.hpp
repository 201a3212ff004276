// The engines that `diffx build` put into a bundle, as the record beside each of them says; see diffexport/engines.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "bundle.hpp"

namespace diffx::core {

/// A range of batches that an engine takes.
struct Profile {
    std::size_t least, most;
};

struct Engine {
    std::filesystem::path file;
    std::string graph;
    std::vector<Profile> profiles;
};

/// What runs here: which product, its version, and the GPU.
struct Target {
    std::string backend;    // "trt-rtx"
    std::string product;    // "tensorrt_rtx"
    std::string version;    // "1.7.1.116"
    std::string capability; // "sm89"
};

/// The engines of a bundle that were built from its graphs and weights, and for this target; each has been checked
/// against its record. Throws DIFFX_BACKEND_ERROR where there is none, which says why not and what to type.
std::vector<Engine> engines_for(const Bundle& bundle, const Target& target);

/// The largest batch that every step graph among these takes.
std::size_t max_batch(const std::vector<Engine>& engines);

/// The engine of a graph for a batch, its profile, and the batch to run it at: the one that wastes least.
struct Choice {
    const Engine* engine;
    std::size_t profile, batch;
};
Choice choose(const std::vector<Engine>& engines, const std::string& graph, std::size_t batch);

} // namespace diffx::core
