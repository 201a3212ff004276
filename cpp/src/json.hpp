// Whole numbers of JSON, which nlohmann-json would make of fractions, and of numbers that do not fit, without a word.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <utility>
#include <vector>

namespace diffx::core {

template <typename Number>
Number whole(const nlohmann::json& value) {
    const bool fits = value.is_number_unsigned()  ? std::in_range<Number>(value.get<std::uint64_t>())
                      : value.is_number_integer() ? std::in_range<Number>(value.get<std::int64_t>())
                                                  : false;
    if (!fits) throw std::out_of_range(value.dump() + ": expected a whole number that fits");
    return value.get<Number>();
}

template <typename Number>
std::vector<Number> whole_numbers(const nlohmann::json& values) {
    std::vector<Number> numbers;
    for (const auto& value : values) numbers.push_back(whole<Number>(value));
    return numbers;
}

} // namespace diffx::core
