// The example of the documentation, as it stands there.
#include <cstdio>

#include "diffx.hpp"

int main(int, char** words) {
    diffx::Bundle bundle(words[1]);
    auto sampler = bundle.sampler(diffx::Backend::OnnxRuntime);
    auto images = sampler.sample({.labels = {3, 1, 4}, .steps = 20, .seed = 0});
    std::printf("%zu sides, %zu numbers, first %.9g\n", images.shape.size(), images.data.size(),
                double{images.data[0]});
}
