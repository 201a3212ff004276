// The command line of diffx-sample, in the words of `diffx sample`.
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>

struct Arguments {
    std::string bundle;
    std::string backend = "ort";
    std::optional<std::string> labels{}; // 3,1,4 or 0-9 or all, by number or name
    std::optional<std::size_t> num{};
    std::optional<std::size_t> per_label{};
    std::string sampler; // empty, 0 or NaN: the bundle's default
    int steps = 0;
    double guidance_scale = std::nan("");
    std::uint64_t seed = 0;
    std::uint64_t first = 0;
    int batch = 0;
    int threads = 0;
    int device = 0;
    std::string out; // PNG
    std::string npy;
    bool selftest = false;
    bool believed = false; // --no-selftest
    bool cuda_graph = true;
    bool json = false;
};

/// Read the command line. Prints the help or the version and ends the program where these are asked for.
/// Throws std::invalid_argument, which says what is wrong with a call.
Arguments parse_arguments(int count, char** words);
