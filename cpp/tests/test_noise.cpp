// The noise of every language: published Philox answers, and the repository's normals.
#include <doctest/doctest.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <vector>

#include "noise.hpp"

using diffx::core::fill_normal;
using diffx::core::philox4x32;

namespace {

nlohmann::json vectors() {
    std::ifstream file(DIFFX_NOISE_VECTORS);
    REQUIRE(file);
    return nlohmann::json::parse(file);
}

std::uint32_t word(const nlohmann::json& text) {
    return static_cast<std::uint32_t>(std::stoul(text.get<std::string>(), nullptr, 16));
}

} // namespace

TEST_CASE("Philox gives the published answers") {
    const auto cases = vectors().at("philox4x32_10");
    REQUIRE(cases.size() >= 3);
    for (const auto& one : cases) {
        const auto& c = one.at("counter");
        const auto& k = one.at("key");
        const auto found = philox4x32({word(c[0]), word(c[1]), word(c[2]), word(c[3])}, {word(k[0]), word(k[1])});
        for (std::size_t place = 0; place < 4; ++place) CHECK(found[place] == word(one.at("out")[place]));
    }
}

TEST_CASE("normals match the repository's vectors") {
    const auto cases = vectors().at("normal");
    REQUIRE(cases.size() >= 5);
    for (const auto& one : cases) {
        const auto expected = one.at("values").get<std::vector<double>>();
        std::vector<float> found(expected.size());
        fill_normal(found, one.at("seed"), one.at("index"), one.at("draw"));
        for (std::size_t k = 0; k < found.size(); ++k)
            CHECK(std::abs(found[k] - expected[k]) <= 1e-6 * std::abs(expected[k]) + 1e-7);
    }
}

TEST_CASE("the first numbers of a sample do not depend on how many there are") {
    std::vector<float> few(5), many(11);
    fill_normal(few, 3, 7, 2);
    fill_normal(many, 3, 7, 2);
    CHECK(std::equal(few.begin(), few.end(), many.begin()));
}

TEST_CASE("every bit of seed, index and draw matters") {
    std::vector<float> base(4), other(4);
    fill_normal(base, 0, 0, 0);
    const auto differs = [&](std::uint64_t seed, std::uint64_t index, std::uint32_t draw) {
        fill_normal(other, seed, index, draw);
        return base != other;
    };
    for (unsigned bit = 0; bit < 64; ++bit) {
        CHECK(differs(std::uint64_t{1} << bit, 0, 0));
        CHECK(differs(0, std::uint64_t{1} << bit, 0));
    }
    for (unsigned bit = 0; bit < 32; ++bit) CHECK(differs(0, 0, std::uint32_t{1} << bit));
}
