// Four threads draw from one bundle at once, each with a sampler of its own; each result is the one drawn alone.
#include <cstdio>
#include <thread>
#include <vector>

#include "diffx.hpp"

int main(int, char** words) {
    const diffx::Bundle bundle(words[1]);
    const auto draw = [&](std::uint64_t first) {
        auto sampler = bundle.sampler(words[2], {sizeof(diffx_options), 1, 0, 0, 0});
        std::vector<float> all;
        for (const double guidance : {1.0, 2.0}) {
            const auto images = sampler.sample({.labels = {0, 1, 2},
                                                .num = 0,
                                                .sampler = "ddpm",
                                                .steps = 10,
                                                .guidance_scale = guidance,
                                                .seed = 1,
                                                .first = first,
                                                .batch = 2});
            all.insert(all.end(), images.data.begin(), images.data.end());
        }
        return all;
    };
    std::vector<std::vector<float>> together(4), alone(4);
    std::vector<std::thread> threads;
    for (std::size_t k = 0; k < together.size(); ++k) threads.emplace_back([&, k] { together[k] = draw(10 * k); });
    for (auto& thread : threads) thread.join();
    for (std::size_t k = 0; k < alone.size(); ++k) alone[k] = draw(10 * k);
    const bool same = together == alone && alone[0] != alone[1];
    std::puts(same ? "the same" : "DIFFERENT");
    return same ? 0 : 1;
}
