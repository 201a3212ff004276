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
    std::size_t batch(const std::string& name) const {
        const std::size_t batch = floats(name).size() / size_;
        if (batch == 0) throw error(DIFFX_BUNDLE_ERROR, "golden case ", name, ": is empty");
        return batch;
    }
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

/// Runs cases on a network, each in as many parts as the network's largest batch asks for.
class Runner {
public:
    Runner(const Bundle& bundle, Network& network, int repeats)
        : manifest_(bundle.manifest()), limits_(limits_of(manifest_)), cases_(bundle), network_(network),
          repeats_(repeats) {}

    /// One row applied to a recorded state.
    void step(const std::string& name, GraphSet graphs, std::vector<Finding>& findings) const {
        const Row row = cases_.rows(name + ".row").front();
        if (!graphs[step_graph(row[kGuidance])]) return;
        const std::size_t batch = cases_.batch(name + ".x"), numbers = batch * manifest_.size;
        const auto x = cases_.floats(name + ".x", numbers), h = cases_.floats(name + ".h", numbers),
                   z = cases_.floats(name + ".z", numbers);
        const auto labels = labels_of(name, batch);
        std::vector<float> x_next(numbers), h_next(numbers);
        const double seconds = in_parts(batch, [&](State& state, std::size_t start, std::size_t count) {
            state.begin(part(x, start, count), part_of(labels, start, count), part(h, start, count));
            std::ranges::copy(part(z, start, count), state.noise().begin());
            state.step(row);
            state.read(part(std::span(x_next), start, count), part(std::span(h_next), start, count));
        });
        // An error is taken relative to what an output of unit RMS puts into the result, where that is larger.
        const double unit = std::abs(row[kCOut]) * std::sqrt(static_cast<double>(numbers));
        findings.push_back(held(name + ".x_next", x_next, cases_.floats(name + ".x_next", numbers), limits_.step,
                                seconds, unit * std::abs(row[kXD])));
        findings.push_back(held(name + ".h_next", h_next, cases_.floats(name + ".h_next", numbers), limits_.step,
                                seconds, unit * std::abs(row[kHD])));
    }

    /// A whole run from noise.
    void run(GraphSet graphs, std::vector<Finding>& findings) const {
        const auto rows = cases_.rows("run.rows");
        if (!graphs[step_graph(rows.front()[kGuidance])]) return;
        const float x_scale = cases_.floats("run.x_scale", 1)[0];
        const std::size_t batch = cases_.batch("run.x");
        const auto labels = labels_of("run", batch);
        std::vector<float> x(batch * manifest_.size);
        const double seconds = in_parts(batch, [&](State& state, std::size_t first, std::size_t count) {
            const auto fill = [&](std::span<float> all, std::size_t draw) {
                for (std::size_t k = 0; k < count; ++k)
                    fill_normal(part(all, k, 1), kSeed, first + k, static_cast<std::uint32_t>(draw));
            };
            const auto start = part(std::span(x), first, count);
            fill(start, 0);
            for (float& number : start) number *= x_scale;
            state.begin(start, part_of(labels, first, count), {});
            for (std::size_t k = 0; k < rows.size(); ++k) {
                if (rows[k][kNoise] != 0) fill(state.noise(), 1 + k);
                state.step(rows[k]);
            }
            state.read(start, {});
        });
        Finding run = compared("run", x, cases_.floats("run.x", x.size()));
        run.held_by_psnr = limits_.psnr > 0;
        run.limit = run.held_by_psnr ? limits_.psnr : limits_.trajectory;
        run.passed = run.held_by_psnr ? run.psnr >= run.limit : run.relative_l2 <= run.limit;
        run.seconds_per_step = seconds / static_cast<double>(rows.size());
        findings.push_back(run);
    }

    /// The image of recorded latents.
    void image(GraphSet graphs, std::vector<Finding>& findings) const {
        if (!manifest_.decoder || !graphs[kDecoder]) return;
        std::vector<float> image(manifest_.image_size);
        const auto latents = cases_.floats("decoder.x", manifest_.size);
        const double seconds = fastest([&] { decode(network_, manifest_, *manifest_.decoder, latents, image); });
        findings.push_back(
            held("decoder.image", image, cases_.floats("decoder.image", image.size()), limits_.step, seconds));
    }

    const Cases& cases() const { return cases_; }

private:
    template <typename Number>
    std::span<Number> part(std::span<Number> numbers, std::size_t start, std::size_t count) const {
        return numbers.subspan(start * manifest_.size, count * manifest_.size);
    }

    std::span<const std::int64_t> labels_of(const std::string& name, std::size_t batch) const {
        const auto labels = cases_.labels(name + ".label");
        if (labels.size() != (manifest_.num_classes == 0 ? 0 : batch))
            throw error(DIFFX_BUNDLE_ERROR, "golden case ", name, ": has ", labels.size(), " labels, expected ", batch);
        return labels;
    }
    static std::span<const std::int64_t> part_of(std::span<const std::int64_t> labels, std::size_t start,
                                                 std::size_t count) {
        return labels.empty() ? labels : labels.subspan(start, count);
    }

    /// Seconds of a case: run(state, first sample, number of samples).
    template <typename Run>
    double in_parts(std::size_t batch, const Run& run) const {
        const std::size_t most = network_.max_batch() == 0 ? batch : std::min(batch, network_.max_batch());
        double seconds = 0;
        for (std::size_t start = 0; start < batch; start += most) {
            const std::size_t count = std::min(most, batch - start);
            const auto state = network_.state(count);
            seconds += fastest([&] { run(*state, start, count); });
        }
        return seconds;
    }

    /// Seconds of the fastest of some runs.
    template <typename Run>
    double fastest(const Run& run) const {
        double best = std::numeric_limits<double>::infinity();
        for (int repeat = 0; repeat < repeats_; ++repeat) {
            const auto started = std::chrono::steady_clock::now();
            run();
            best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count());
        }
        return best;
    }

    const Manifest& manifest_;
    const Limits& limits_;
    const Cases cases_;
    Network& network_;
    int repeats_;
};

} // namespace

std::vector<Finding> selftest(const Bundle& bundle, Network& network, GraphSet graphs, int repeats) {
    const Runner runner(bundle, network, repeats);
    std::vector<Finding> findings;
    for (const std::string& name : runner.cases().steps()) runner.step(name, graphs, findings);
    runner.run(graphs, findings);
    runner.image(graphs, findings);
    return findings;
}

void require_passed(const std::vector<Finding>& findings, const std::string& device) {
    const auto failures = std::ranges::count(findings, false, &Finding::passed);
    if (failures == 0) return;
    const auto off = [](const Finding& f) { // how far beyond its limit
        const double ratio = f.held_by_psnr ? f.limit / std::max(f.psnr, 1e-9) : f.relative_l2 / f.limit;
        return f.passed ? 0 : std::isnan(ratio) ? std::numeric_limits<double>::infinity() : ratio;
    };
    const Finding& worst = *std::ranges::max_element(findings, {}, off);
    throw error(DIFFX_PARITY_ERROR, failures, " of ", findings.size(),
                " golden cases differ from the recorded results on ", device, ", most of all ", worst.name, " (",
                worst.held_by_psnr ? "PSNR " : "relative L2 ", worst.held_by_psnr ? worst.psnr : worst.relative_l2,
                ", limit ", worst.limit, "); it is not to be used");
}

} // namespace diffx::core
