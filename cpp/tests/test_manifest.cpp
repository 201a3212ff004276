// The reader of manifests: every fact that is missing or impossible is refused before anything is allocated for it.
#include <doctest/doctest.h>

#include <nlohmann/json.hpp>

#include "error.hpp"
#include "manifest.hpp"

using diffx::core::parse_manifest;
using nlohmann::json;

namespace {

json good() {
    json manifest = json::parse(R"({
        "schema": 1, "name": "toy", "precision": "fp32", "decoder": {"upscale": 8, "channels": 3, "tile": null},
        "model": {"shape": [4, 32, 32], "num_classes": 2, "label_names": ["ant", "bee"], "has_null": true},
        "defaults": {"sampler": "ddim", "steps": 20, "guidance_scale": 1.0, "batch": 8}, "files": {}})");
    for (const char* name :
         {"weights.bin", "step.onnx", "step_plain.onnx", "decoder.onnx", "plans.safetensors", "golden.safetensors"})
        manifest["files"][name] = {{"size", 1}, {"sha256", "00"}};
    return manifest;
}

void refused(const std::string& text, const std::string& message) {
    try {
        parse_manifest(text, "m.json");
        FAIL("was read");
    } catch (const diffx::core::Error& problem) {
        CHECK(problem.status == DIFFX_BUNDLE_ERROR);
        CHECK(std::string(problem.what()).starts_with("m.json: "));
        CHECK_MESSAGE(std::string(problem.what()).find(message) != std::string::npos, problem.what());
    }
}

} // namespace

TEST_CASE("a manifest is read") {
    const auto manifest = parse_manifest(good().dump(), "m.json");
    CHECK(manifest.size == 4 * 32 * 32);
    CHECK(manifest.image_shape == std::vector<std::int64_t>{3, 256, 256});
    CHECK(manifest.label_names.at(1) == "bee");
    CHECK(manifest.files.size() == 6);
}

TEST_CASE("fields that a later version adds are left alone") {
    json manifest = good();
    manifest["later"] = manifest["model"]["later"] = {1, 2};
    CHECK(parse_manifest(manifest.dump(), "m.json").name == "toy");
}

TEST_CASE("what is wrong is refused") {
    const auto changed = [](const char* place, const json& value, const char* message) {
        json manifest = good();
        manifest[json::json_pointer(place)] = value;
        CAPTURE(place);
        refused(manifest.dump(), message);
    };
    refused("", "not a valid manifest");
    refused("{", "not a valid manifest");
    refused("[]", "not a valid manifest");
    refused("{}", "schema");
    refused(std::string(1'000'000, '['), "not a valid manifest");
    changed("/schema", 2, "schema version 2, this diffx reads 1; export the model again");
    changed("/schema", "1", "schema version \"1\"");
    changed("/model/shape", json::array(), "model.shape");
    changed("/model/shape", {4, 0, 32}, "model.shape");
    changed("/model/shape", {4, -1, 32}, "model.shape");
    changed("/model/shape", {1LL << 40, 1LL << 40, 1LL << 40}, "model.shape");
    changed("/model/shape", "big", "not a valid manifest");
    changed("/model/num_classes", -1, "num_classes");
    changed("/model/label_names", {"ant"}, "label_names");
    changed("/defaults/steps", 0, "defaults");
    changed("/defaults/batch", -3, "defaults");
    changed("/decoder/upscale", 0, "decoder.upscale");
    changed("/decoder/upscale", 65536, "model.shape");
    changed("/decoder/channels", 1LL << 60, "decoder.channels");
    changed("/decoder/tile", 12, "decoder.tile");
    changed("/files/..~1other", {{"size", 1}, {"sha256", ""}}, "plain file name");
    changed("/files/~1etc~1passwd", {{"size", 1}, {"sha256", ""}}, "plain file name");
    changed("/files/..", {{"size", 1}, {"sha256", ""}}, "plain file name");
    changed("/files/weights.bin/size", -1, "-1: expected a whole number that fits");
    changed("/files/weights.bin/size", 1.5, "1.5: expected a whole number");
    changed("/model/shape", {4.5, 32, 32}, "4.5: expected a whole number");
    changed("/defaults/steps", 1LL << 40, "expected a whole number that fits");
    for (const char* name : {"weights.bin", "step.onnx", "plans.safetensors", "decoder.onnx"}) {
        json manifest = good();
        manifest["files"].erase(name);
        refused(manifest.dump(), std::string("does not list ") + name);
    }
}
