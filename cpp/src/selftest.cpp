#include "selftest.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <set>

#include "decoding.hpp"
#include "error.hpp"
#include "noise.hpp"

namespace diffx::core {
namespace {

constexpr int kRepeats = 3;        // of each case; the fastest counts
constexpr std::uint64_t kSeed = 0; // of the recorded run

/// What a precision is held to, as diffexport/parity.py has it: a whole run by relative error, or by PSNR where that is
/// given.
struct Limits {
    const char* precision;
    double step, trajectory, psnr;
};
constexpr Limits kLimits[] = {
    {"fp32", 1e-5, 1e-4, 0}, {"fp16", 3e-3, 0, 40}, {"bf16", 2e-2, 0, 30}, {"int8", 1e-1, 0, 25}};

const Limits& limits_of(const Manifest& manifest) {
    for (const Limits& limits : kLimits)
        if (manifest.precision == limits.precision) return limits;
    throw error(DIFFX_BUNDLE_ERROR, "precision '", manifest.precision, "': this diffx knows no limits for it");
}

/// at_least: what the error is taken relative to where that is larger than the expected itself.
Finding compared(std::string name, std::span<const float> found, std::span<const float> expected, double at_least = 0) {
    double error = 0, scale = at_least * at_least, largest = 0, square = 0;
    for (std::size_t k = 0; k < expected.size(); ++k) {
        const double difference = static_cast<double>(found[k]) - expected[k];
        error += difference * difference, square += static_cast<double>(expected[k]) * expected[k];
        largest = std::isnan(difference) ? difference : std::max(largest, std::abs(difference));
    }
    scale = std::max(scale, square);
    const auto [low, high] = std::ranges::minmax(expected);
    const double peak = static_cast<double>(high) - low, mse = error / static_cast<double>(expected.size());
    const double psnr = mse == 0 ? std::numeric_limits<double>::infinity() : 10 * std::log10(peak * peak / mse);
    return {std::move(name), false, false, scale == 0 ? std::sqrt(error) : std::sqrt(error / scale),
            largest,         psnr,  0,     0};
}

/// A comparison that is held to a relative error.
Finding held(std::string name, std::span<const float> found, std::span<const float> expected, double limit,
             double seconds, double at_least = 0) {
    Finding finding = compared(std::move(name), found, expected, at_least);
    finding.limit = limit;
    finding.passed = finding.relative_l2 <= limit;
    finding.seconds_per_step = seconds;
    return finding;
}

/// The recorded tensors by name; a missing one is said.
class Cases {
public:
    explicit Cases(const Bundle& bundle) : tensors_(bundle.golden()), size_(bundle.manifest().size) {}

    std::span<const float> floats(const std::string& name) const { return at(name).floats; }
    std::span<const std::int64_t> labels(const std::string& name) const {
        return tensors_.contains(name) ? std::span(at(name).integers) : std::span<const std::int64_t>();
    }
    /// Samples in a tensor of (B, *shape), which others of the same case must have as well.
    std::size_t batch(const std::string& name) const { return floats(name).size() / size_; }
    std::span<const float> floats(const std::string& name, std::size_t count) const {
        if (floats(name).size() != count)
            throw error(DIFFX_BUNDLE_ERROR, "golden case ", name, ": has ", floats(name).size(), " numbers, expected ",
                        count);
        return floats(name);
    }
    std::vector<Row> rows(const std::string& name) const {
        const auto numbers = floats(name);
        if (numbers.empty() || numbers.size() % kColumns != 0)
            throw error(DIFFX_BUNDLE_ERROR, "golden case ", name, ": is no row of a plan");
        std::vector<Row> rows(numbers.size() / kColumns);
        for (std::size_t k = 0; k < rows.size(); ++k)
            std::ranges::copy(numbers.subspan(k * kColumns, kColumns), rows[k].begin());
        return rows;
    }
    std::set<std::string> steps() const {
        std::set<std::string> found;
        for (const auto& [name, tensor] : tensors_)
            if (name.starts_with("step.")) found.insert(name.substr(0, name.find('.', 5)));
        return found;
    }

private:
    const Tensor& at(const std::string& name) const {
        const auto found = tensors_.find(name);
        if (found == tensors_.end())
            throw error(DIFFX_BUNDLE_ERROR, "golden case ", name, ": is missing; export the model again");
        return found->second;
    }
    Tensors tensors_;
    std::size_t size_;
};

/// Seconds of the fastest of some runs.
template <typename Run>
double fastest(const Run& run) {
    double best = std::numeric_limits<double>::infinity();
    for (int repeat = 0; repeat < kRepeats; ++repeat) {
        const auto started = std::chrono::steady_clock::now();
        run();
        best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count());
    }
    return best;
}

} // namespace

std::vector<Finding> selftest(Sampler& sampler) {
    const Manifest& manifest = sampler.bundle().manifest();
    const Limits& limits = limits_of(manifest);
    const Cases cases(sampler.bundle());
    const auto labels_of = [&](const std::string& name, std::size_t batch) {
        const auto labels = cases.labels(name);
        if (labels.size() != (manifest.num_classes == 0 ? 0 : batch))
            throw error(DIFFX_BUNDLE_ERROR, "golden case ", name, ": has ", labels.size(), " labels, expected ", batch);
        return labels;
    };
    std::vector<Finding> findings;
    for (const std::string& name : cases.steps()) {
        const std::size_t batch = cases.batch(name + ".x"), numbers = batch * manifest.size;
        if (batch == 0) throw error(DIFFX_BUNDLE_ERROR, "golden case ", name, ": is empty");
        const auto x = cases.floats(name + ".x", numbers), h = cases.floats(name + ".h", numbers),
                   z = cases.floats(name + ".z", numbers);
        const auto labels = labels_of(name + ".label", batch);
        const Row row = cases.rows(name + ".row").front();
        std::vector<float> x_next(numbers), h_next(numbers);
        const auto state = sampler.network().state(batch);
        const double seconds = fastest([&] {
            state->begin(x, labels, h);
            std::ranges::copy(z, state->noise().begin());
            state->step(row);
            state->read(x_next, h_next);
        });
        // An error is taken relative to what an output of unit RMS puts into the result, where that is larger.
        const double unit = std::abs(row[kCOut]) * std::sqrt(static_cast<double>(numbers));
        findings.push_back(held(name + ".x_next", x_next, cases.floats(name + ".x_next", numbers), limits.step, seconds,
                                unit * std::abs(row[kXD])));
        findings.push_back(held(name + ".h_next", h_next, cases.floats(name + ".h_next", numbers), limits.step, seconds,
                                unit * std::abs(row[kHD])));
    }
    const auto rows = cases.rows("run.rows");
    const std::size_t batch = cases.batch("run.x"), numbers = batch * manifest.size;
    if (batch == 0) throw error(DIFFX_BUNDLE_ERROR, "golden case run: is empty");
    const float x_scale = cases.floats("run.x_scale", 1)[0];
    const auto labels = labels_of("run.label", batch);
    const auto state = sampler.network().state(batch);
    std::vector<float> x(numbers), start(numbers);
    const auto fill = [&](std::span<float> all, std::size_t draw) {
        for (std::size_t k = 0; k < batch; ++k)
            fill_normal(all.subspan(k * manifest.size, manifest.size), kSeed, k, static_cast<std::uint32_t>(draw));
    };
    fill(start, 0);
    for (float& number : start) number *= x_scale;
    const double seconds = fastest([&] {
        state->begin(start, labels, {});
        for (std::size_t k = 0; k < rows.size(); ++k) {
            if (rows[k][kNoise] != 0) fill(state->noise(), 1 + k);
            state->step(rows[k]);
        }
        state->read(x, {});
    });
    Finding run = compared("run", x, cases.floats("run.x", numbers));
    run.held_by_psnr = limits.psnr > 0;
    run.limit = run.held_by_psnr ? limits.psnr : limits.trajectory;
    run.passed = run.held_by_psnr ? run.psnr >= run.limit : run.relative_l2 <= run.limit;
    run.seconds_per_step = seconds / static_cast<double>(rows.size());
    findings.push_back(run);
    if (manifest.decoder) {
        std::vector<float> image(manifest.image_size);
        const auto latents = cases.floats("decoder.x", manifest.size);
        const double taken = fastest([&] { decode(sampler.network(), manifest, *manifest.decoder, latents, image); });
        findings.push_back(
            held("decoder.image", image, cases.floats("decoder.image", image.size()), limits.step, taken));
    }
    return findings;
}

} // namespace diffx::core
