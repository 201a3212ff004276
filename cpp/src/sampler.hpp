// Sampling: a plan, noise and a network make images. Nothing here knows which backend runs, or which sampler.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "backend.hpp"
#include "bundle.hpp"

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
    Sampler(std::shared_ptr<const Bundle> bundle, const std::string& backend, const Options& options);

    /// Draw request.num images into images, (num, *shape). What a request leaves empty, 0 or NaN is the bundle's
    /// default.
    void sample(const Request& request, std::span<float> images);

    const Bundle& bundle() const { return *bundle_; }
    const std::string& device() const { return device_; }
    Network& network() { return *network_; }

private:
    State& state(std::size_t batch);

    std::shared_ptr<const Bundle> bundle_;
    std::string backend_;
    std::shared_ptr<Network> network_;
    std::string device_;
    std::vector<std::pair<std::size_t, std::unique_ptr<State>>> states_; // by batch: a full one and the rest
    std::vector<float> start_;
    std::vector<std::int64_t> labels_;
};

} // namespace diffx::core
