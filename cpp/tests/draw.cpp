// Draws five images with each of some samplers, on one backend, and writes them one after the other as float32.
#include <fstream>

#include "diffx.hpp"

int main(int count, char** words) {
    const std::vector<std::string> given(words + 1, words + count); // BUNDLE BACKEND STEPS GUIDANCE OUT SAMPLER...
    const diffx::Bundle bundle(given.at(0));
    auto sampler = bundle.sampler(given.at(1).c_str(), {sizeof(diffx_options), 1, 0, 0, 0});
    std::ofstream out(given.at(4), std::ios::binary);
    for (std::size_t k = 5; k < given.size(); ++k) {
        const auto images = sampler.sample({.num = 5,
                                            .sampler = given[k],
                                            .steps = std::stoi(given.at(2)),
                                            .guidance_scale = std::stod(given.at(3)),
                                            .seed = (std::uint64_t{1} << 40) + 3,
                                            .first = 5,
                                            .batch = 2});
        out.write(reinterpret_cast<const char*>(images.data.data()),
                  static_cast<std::streamsize>(images.data.size() * sizeof(float)));
    }
}
