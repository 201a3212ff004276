// Sampling: a plan, noise and a network make images. Nothing here knows which backend runs, or which sampler.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "backend.hpp"
#include "bundle.hpp"
#include "selftest.hpp"

namespace diffx::core {

/// One run; the fields are those of diffx_request.
struct Request {
    std::span<const std::int64_t> labels;
    std::size_t num;
    std::string sampler;
    int steps;
    double guidance_scale;
    std::uint64_t seed, first;
    int batch;
    void (*on_step)(void* user, std::size_t done, std::size_t total);
    void* user;
};

/// Draws images of one bundle on one backend; used by one thread at a time.
class Sampler {
public:
    /// tested: the golden cases of a graph are run before its first sample.
    Sampler(std::shared_ptr<const Bundle> bundle, const std::string& backend, const Options& options, bool tested);

    /// Draw request.num images into images, (num, *shape). What a request leaves empty, 0 or NaN is the bundle's
    /// default.
    void sample(const Request& request, std::span<float> images);

    /// Run every golden case, some times each.
    std::vector<Finding> selftest();

    const std::string& device() const { return device_; }

private:
    State& state(std::size_t batch);
    /// Throw DIFFX_PARITY_ERROR unless the golden cases of these graphs pass here.
    void believe(GraphSet graphs);

    std::shared_ptr<const Bundle> bundle_;
    std::string backend_;
    std::shared_ptr<Network> network_;
    std::string device_;
    GraphSet believed_; // graphs whose golden cases have passed, or need not
    std::vector<std::pair<std::size_t, std::unique_ptr<State>>> states_; // by batch: a full one and the rest
    std::vector<std::int64_t> labels_;
};

} // namespace diffx::core
