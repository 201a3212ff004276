// The reader of safetensors, on what is right and on everything that is not.
#include <doctest/doctest.h>

#include <cstring>
#include <string>

#include "error.hpp"
#include "safetensors.hpp"

using diffx::core::parse_safetensors;
using diffx::core::Tensors;

namespace {

std::string file_of(const std::string& header, const std::string& data, std::uint64_t length) {
    std::string file(sizeof length, '\0');
    std::memcpy(file.data(), &length, sizeof length);
    return file + header + data;
}

Tensors parsed(const std::string& file) {
    return parse_safetensors(std::as_bytes(std::span(file)), "t.safetensors");
}
Tensors parsed(const std::string& header, const std::string& data) {
    return parsed(file_of(header, data, header.size()));
}

const std::string kEight(8, '\x3f'); // bytes

} // namespace

TEST_CASE("tensors are read with their shapes") {
    const auto tensors = parsed(R"({"__metadata__":{"a":"b"},"x":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},)"
                                R"("n":{"dtype":"I64","shape":[1],"data_offsets":[8,16]},)"
                                R"("none":{"dtype":"F32","shape":[0],"data_offsets":[16,16]}})",
                                kEight + std::string("\x05\0\0\0\0\0\0\0", 8));
    CHECK(tensors.size() == 3);
    CHECK(tensors.at("x").shape == std::vector<std::int64_t>{2, 1});
    CHECK(tensors.at("x").floats.size() == 2);
    CHECK(tensors.at("n").integers == std::vector<std::int64_t>{5});
    CHECK(tensors.at("none").floats.empty());
}

TEST_CASE("what is wrong is refused with the file's and the tensor's name") {
    const auto refused = [](const std::string& file, const std::string& message) {
        try {
            parsed(file);
            FAIL("was read");
        } catch (const diffx::core::Error& problem) {
            CHECK(problem.status == DIFFX_BUNDLE_ERROR);
            CHECK(std::string(problem.what()).starts_with("t.safetensors: "));
            CHECK_MESSAGE(std::string(problem.what()).find(message) != std::string::npos, problem.what());
        }
    };
    const auto tensor = [](const std::string& fields) {
        const std::string header = R"({"x":{)" + fields + "}}";
        return file_of(header, kEight, header.size());
    };
    refused("", "cut off");
    refused("1234567", "cut off");
    refused(file_of("{}", "", 3), "its header has 3 bytes");
    refused(file_of("{}", "", ~std::uint64_t{0}), "its header has 18446744073709551615 bytes");
    refused(file_of("{", "", 1), "not as safetensors have it");
    refused(file_of("[1]", "", 3), "not as safetensors have it");
    refused(file_of("7", "", 1), "not as safetensors have it");
    refused(file_of(std::string(100'000, '['), "", 100'000), "not as safetensors have it");
    refused(tensor(R"("dtype":"F32","shape":[2])"), "tensor x is not as safetensors have it");
    refused(tensor(R"("dtype":"F16","shape":[4],"data_offsets":[0,8])"), "of type F16");
    refused(tensor(R"("dtype":"F32","shape":[2],"data_offsets":[0,9])"), "outside the file");
    refused(tensor(R"("dtype":"F32","shape":[2],"data_offsets":[8,0])"), "outside the file");
    refused(tensor(R"("dtype":"F32","shape":[2],"data_offsets":[0])"), "outside the file");
    refused(tensor(R"("dtype":"F32","shape":[2],"data_offsets":[-8,8])"), "-8: expected a whole number that fits");
    refused(tensor(R"("dtype":"F32","shape":[2],"data_offsets":[0,1e300])"), "1e+300: expected a whole number");
    refused(tensor(R"("dtype":"F32","shape":[3],"data_offsets":[0,8])"), "its shape and its bytes differ");
    refused(tensor(R"("dtype":"F32","shape":[1],"data_offsets":[0,8])"), "its shape and its bytes differ");
    refused(tensor(R"("dtype":"F32","shape":[-2],"data_offsets":[0,8])"), "a negative side");
    refused(tensor(R"("dtype":"F32","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,8])"),
            "more than the file holds");
}
