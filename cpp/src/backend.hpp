// The one interface between a sampler and whatever runs the network.
#pragma once

#include <array>
#include <bitset>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

namespace diffx::core {

class Bundle;

inline constexpr std::size_t kColumns = 13; // of a plan, as diffexport/plan.py has them
inline constexpr std::size_t kCOut = 3, kGuidance = 4, kXD = 6, kNoise = 8, kHD = 11; // c_out, w, x_d, x_z, h_d

/// One row of a plan.
using Row = std::array<float, kColumns>;

/// The graphs of a bundle that are run: for rows without guidance, for rows with it, the decoder.
inline constexpr std::size_t kPlain = 0, kGuided = 1, kDecoder = 2;
inline constexpr std::array<const char*, 3> kGraphs = {"step_plain", "step", "decoder"};
using GraphSet = std::bitset<kGraphs.size()>;

/// The graph that applies rows of a guidance weight.
constexpr std::size_t step_graph(float guidance) {
    return guidance == 1.0f ? kPlain : kGuided;
}

struct Options {
    int threads = 0;        // of one operator on a CPU; 0: every core that this process may use
    int device = 0;         // index of the GPU
    bool cuda_graph = true; // launch a step of TensorRT as one CUDA graph
    auto operator<=>(const Options&) const = default;
};

/// Room on the device for the state (x, h) of one batch, used by one thread. B is the user's batch.
class State {
public:
    virtual ~State() = default;
    /// Start a run: x (B, *shape), one label for each sample unless the model has none, h as x or empty for zero.
    virtual void begin(std::span<const float> x, std::span<const std::int64_t> labels, std::span<const float> h) = 0;
    /// Where the noise of the next step is written before it, (B, *shape) on the host; begin() and read() may be given
    /// it, too.
    virtual std::span<float> noise() = 0;
    /// Apply one row; it reads the noise where its x_z is not 0.
    virtual void step(const Row& row) = 0;
    /// Copy the state to the host; an empty span is left out.
    virtual void read(std::span<float> x, std::span<float> h) = 0;
};

/// The graphs of a bundle on a device: the weights, which all samplers share. May be used from several threads.
class Network {
public:
    virtual ~Network() = default;
    /// What it really runs on, as the runtime says.
    virtual std::string device() const = 0;
    /// The largest batch that every step graph takes; 0 where there is no limit.
    virtual std::size_t max_batch() const = 0;
    virtual std::unique_ptr<State> state(std::size_t batch) = 0;
    /// Run the decoder on one sample (C, *sides) of any two sides; image has the room that its upscaling needs.
    virtual void decode(std::span<const float> latents, std::array<std::int64_t, 2> sides, std::span<float> image) = 0;
};

/// Load the graphs of a bundle. The backend that is named is used or DIFFX_BACKEND_ERROR thrown; none takes its place.
std::shared_ptr<Network> open_network(const Bundle& bundle, const std::string& backend, const Options& options);

/// Whether a backend compiles for a GPU: its golden cases are run before it is believed.
bool compiles(const std::string& backend);

/// Names of the backends that were built in, separated by spaces.
const char* backend_names();

/// Threads of one operator: as the options say, or every core that this process may use.
int thread_count(const Options& options);

} // namespace diffx::core
