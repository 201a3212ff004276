#include "arguments.hpp"

#include <getopt.h>

#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <vector>

#include "diffx.h"

namespace {

constexpr const char* kHelp = R"(Usage: diffx-sample BUNDLE [options]

Draw images from a bundle that `diffx export` wrote, without Python. The same seed gives the same images as `diffx sample`.

  --backend NAME          what runs the network: ort, ort-cuda, openvino, trt, trt-rtx [ort]
  --labels LIST           labels, by number or name: 3,1,4 or 0-9 or all [0, 1, 2, ... in turn]
  --num N                 how many images [one for each label, else 16]
  --per-label N           how many images of each label; the PNG has a column for each
  --sampler NAME          the sampler [the bundle's default]
  --steps N               number of steps [the bundle's default]
  --guidance-scale W      guidance weight w of uncond + w*(cond - uncond); 1 is off [the bundle's default]
  --seed N                seed; it and the index decide an image [0]
  --first N               index of the first image [0]
  --batch N               how many are drawn at once [the bundle's default]
  --threads N             threads of one operator on a CPU [every core that this process may use]
  --device N              index of the GPU [0]
  --out FILE              the PNG to write [the bundle's name with .png]
  --npy FILE              write the images as an array, (N, C, H, W) float32
  --selftest              run the golden cases of the bundle here and compare; exit status 1 where one differs
  --no-selftest           on a GPU, do not run them before the first sample
  --no-cuda-graph         TensorRT: do not launch a step as one captured graph
  --json                  print the result as JSON
  --version, --help

Example: diffx-sample digits.diffx --labels 3,1,4 --steps 20 --guidance-scale 3 --seed 0 --out grid.png
)";

template <typename Number>
Number number(const char* option, const char* text, Number least) {
    Number value{};
    const char* end = text + std::strlen(text);
    const auto [stop, problem] = std::from_chars(text, end, value);
    if (problem != std::errc() || stop != end || value < least)
        throw std::invalid_argument(std::string("--") + option + " " + text + ": expected a number of at least " +
                                    std::to_string(least));
    return value;
}

double real(const char* option, const char* text) {
    char* stop = nullptr;
    const double value = std::strtod(text, &stop);
    if (*text == '\0' || *stop != '\0' || !std::isfinite(value))
        throw std::invalid_argument(std::string("--") + option + " " + text + ": expected a finite number");
    return value;
}

struct Option {
    const char* name;
    bool has_value;
    std::function<void(const char* name, const char* value)> read;
};

} // namespace

Arguments parse_arguments(int count, char** words) {
    Arguments found;
    const auto print = [](const std::string& text) {
        std::fputs(text.c_str(), stdout);
        std::exit(0);
    };
    const std::vector<Option> options = {
        {"backend", true, [&](auto, auto value) { found.backend = value; }},
        {"labels", true, [&](auto, auto value) { found.labels = value; }},
        {"num", true, [&](auto name, auto value) { found.num = number<std::size_t>(name, value, 1); }},
        {"per-label", true, [&](auto name, auto value) { found.per_label = number<std::size_t>(name, value, 1); }},
        {"sampler", true, [&](auto, auto value) { found.sampler = value; }},
        {"steps", true, [&](auto name, auto value) { found.steps = number(name, value, 1); }},
        {"guidance-scale", true, [&](auto name, auto value) { found.guidance_scale = real(name, value); }},
        {"seed", true, [&](auto name, auto value) { found.seed = number<std::uint64_t>(name, value, 0); }},
        {"first", true, [&](auto name, auto value) { found.first = number<std::uint64_t>(name, value, 0); }},
        {"batch", true, [&](auto name, auto value) { found.batch = number(name, value, 1); }},
        {"threads", true, [&](auto name, auto value) { found.threads = number(name, value, 1); }},
        {"device", true, [&](auto name, auto value) { found.device = number(name, value, 0); }},
        {"out", true, [&](auto, auto value) { found.out = value; }},
        {"npy", true, [&](auto, auto value) { found.npy = value; }},
        {"selftest", false, [&](auto, auto) { found.selftest = true; }},
        {"no-selftest", false, [&](auto, auto) { found.believed = true; }},
        {"no-cuda-graph", false, [&](auto, auto) { found.cuda_graph = false; }},
        {"json", false, [&](auto, auto) { found.json = true; }},
        {"help", false, [&](auto, auto) { print(kHelp); }},
        {"version", false,
         [&](auto, auto) {
             print(std::string("diffx-sample ") + diffx_version() + ", backends: " + diffx_backends() + "\n");
         }},
    };
    std::vector<option> table;
    table.reserve(options.size() + 1);
    for (const Option& entry : options)
        table.push_back({entry.name, entry.has_value ? required_argument : no_argument, nullptr, 0});
    table.push_back({});
    opterr = 0;
    for (int index = 0, code = 0; (code = getopt_long(count, words, "h", table.data(), &index)) != -1;) {
        if (code == 'h') print(kHelp);
        if (code != 0)
            throw std::invalid_argument(std::string(words[optind - 1]) +
                                        ": no such option, or one that lacks its value; see diffx-sample --help");
        const Option& chosen = options[static_cast<std::size_t>(index)];
        chosen.read(chosen.name, optarg);
    }
    if (optind + 1 != count) throw std::invalid_argument("expected one BUNDLE; see diffx-sample --help");
    found.bundle = words[optind];
    return found;
}
