#include "sampler.hpp"

#include <algorithm>
#include <cmath>

#include "decoding.hpp"
#include "error.hpp"
#include "noise.hpp"

namespace diffx::core {
namespace {

constexpr int kRepeats = 3; // of a golden case whose speed is reported

constexpr std::uint32_t kStart = 0; // draw 0 is the start of sampling, draw 1 + k the noise of row k

/// Normal noise of some samples, one after the other.
void fill_batch(std::span<float> batch, std::size_t size, std::uint64_t seed, std::uint64_t first, std::uint32_t draw) {
    for (std::size_t k = 0; k * size < batch.size(); ++k)
        fill_normal(batch.subspan(k * size, size), seed, first + k, draw);
}

void check_labels(const Manifest& manifest, const Request& request) {
    if (request.labels.empty()) return;
    if (manifest.num_classes == 0)
        throw error(DIFFX_SHAPE_ERROR, "labels: this model has no labels; ask for a number of images instead");
    if (request.labels.size() != request.num)
        throw error(DIFFX_SHAPE_ERROR, "num ", request.num, ": got ", request.labels.size(),
                    " labels; give one of the two");
    for (const std::int64_t label : request.labels)
        if (label < 0 || label >= manifest.num_classes)
            throw error(DIFFX_SHAPE_ERROR, "label ", label, ": this model has labels 0..", manifest.num_classes - 1);
}

} // namespace

Sampler::Sampler(std::shared_ptr<const Bundle> bundle, const std::string& backend, const Options& options, bool tested)
    : bundle_(std::move(bundle)), backend_(backend), network_(bundle_->network(backend, options)),
      device_(network_->device()) {
    if (!tested) believed_.set();
}

std::vector<Finding> Sampler::selftest() {
    return core::selftest(*bundle_, *network_, GraphSet().set(), kRepeats);
}

void Sampler::believe(GraphSet graphs) {
    graphs &= ~believed_;
    if (graphs.none()) return;
    require_passed(core::selftest(*bundle_, *network_, graphs, 1), device_);
    believed_ |= graphs;
}

State& Sampler::state(std::size_t batch) {
    const auto found = std::ranges::find(states_, batch, [](const auto& entry) { return entry.first; });
    if (found != states_.end()) return *found->second;
    if (states_.size() == 2) states_.erase(states_.begin());
    return *states_.emplace_back(batch, network_->state(batch)).second;
}

void Sampler::sample(const Request& request, std::span<float> images) {
    const Manifest& manifest = bundle_->manifest();
    const Defaults& defaults = manifest.defaults;
    if (request.num < 1) throw error(DIFFX_SHAPE_ERROR, "num 0: expected at least 1");
    if (request.steps < 0) throw error(DIFFX_PLAN_ERROR, "steps ", request.steps, ": expected at least 1");
    if (request.batch < 0) throw error(DIFFX_SHAPE_ERROR, "batch ", request.batch, ": expected at least 1");
    if (images.size() / manifest.image_size < request.num)
        throw error(DIFFX_SHAPE_ERROR, "images: there is room for ", images.size(), " numbers, ", request.num,
                    " images have ", manifest.image_size, " each");
    check_labels(manifest, request);
    const double guidance = std::isnan(request.guidance_scale) ? defaults.guidance_scale : request.guidance_scale;
    const Plan plan = bundle_->plan(request.sampler.empty() ? defaults.sampler : request.sampler,
                                    request.steps == 0 ? defaults.steps : request.steps, guidance);
    believe(GraphSet().set(step_graph(static_cast<float>(guidance))).set(kDecoder, manifest.decoder.has_value()));
    auto batch = static_cast<std::size_t>(request.batch == 0 ? defaults.batch : request.batch);
    if (const std::size_t most = network_->max_batch(); request.batch == 0 && most != 0) batch = std::min(batch, most);
    batch = std::min(batch, request.num);
    const std::size_t batches = (request.num + batch - 1) / batch, rows = plan.rows.size();
    for (std::size_t done = 0; done < batches; ++done) {
        const std::size_t start = done * batch, count = std::min(batch, request.num - start);
        const std::uint64_t first = request.first + start;
        State& state = this->state(count);
        const auto noise = state.noise().first(count * manifest.size);
        fill_batch(noise, manifest.size, request.seed, first, kStart);
        for (float& x : noise) x *= plan.x_scale;
        labels_.resize(manifest.num_classes == 0 ? 0 : count);
        for (std::size_t k = 0; k < labels_.size(); ++k)
            labels_[k] = request.labels.empty()
                             ? static_cast<std::int64_t>((start + k) % static_cast<std::size_t>(manifest.num_classes))
                             : request.labels[start + k];
        state.begin(noise, labels_, {});
        for (std::size_t row = 0; row < rows; ++row) {
            if (plan.rows[row][kNoise] != 0)
                fill_batch(noise, manifest.size, request.seed, first, 1 + static_cast<std::uint32_t>(row));
            state.step(plan.rows[row]);
            if (request.on_step != nullptr) request.on_step(request.user, done * rows + row + 1, batches * rows);
        }
        const auto out = images.subspan(start * manifest.image_size, count * manifest.image_size);
        if (manifest.decoder) {
            state.read(noise, {});
            for (std::size_t k = 0; k < count; ++k)
                decode(*network_, manifest, *manifest.decoder, noise.subspan(k * manifest.size, manifest.size),
                       out.subspan(k * manifest.image_size, manifest.image_size));
        } else {
            state.read(out, {});
        }
        const auto bad = std::ranges::find_if(out, [](float number) { return !std::isfinite(number); });
        if (bad != out.end())
            throw error(DIFFX_BACKEND_ERROR, "sample ",
                        first + static_cast<std::size_t>(bad - out.begin()) / manifest.image_size, ": ", backend_,
                        " returned numbers that are not finite; check the bundle with `diffx verify`");
    }
}

} // namespace diffx::core
