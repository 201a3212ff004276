// Samples from a diffexport bundle; C++20 over the C interface of diffx.h, where every detail is said.
//
//     diffx::Bundle bundle("digits.diffx");
//     auto sampler = bundle.sampler(diffx::Backend::OnnxRuntime);
//     auto images = sampler.sample({.labels = {3, 1, 4}, .steps = 20, .seed = 0});
#pragma once

#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "diffx.h"

namespace diffx {

struct Error : std::runtime_error {
    explicit Error(diffx_status kind) : std::runtime_error(diffx_last_error()), status(kind) {}
    diffx_status status;
};

inline void check(diffx_status status) {
    if (status != DIFFX_OK) throw Error(status);
}

enum class Backend { OnnxRuntime, OnnxRuntimeCuda, OpenVino, TensorRt, TensorRtRtx };

struct Request {
    std::vector<std::int64_t> labels{}; // one for each image; empty: 0, 1, 2, ... in turn
    std::size_t num = 0;                // number of images; 0: one for each label
    std::string sampler{};              // empty, 0 or NaN, here and below: the bundle's default
    int steps = 0;
    double guidance_scale = std::nan(""); // w of uncond + w*(cond - uncond); 1 is off
    std::uint64_t seed = 0;               // seed and index alone decide an image
    std::uint64_t first = 0;              // index of the first image
    int batch = 0;                        // how many are drawn at once; of no influence on the images
    std::function<void(std::size_t done, std::size_t total)> on_step{}; // must not throw
};

struct Images {
    std::vector<std::int64_t> shape; // (N, C, H, W), or (N, D) for points
    std::vector<float> data;         // in that order
};

class Sampler { // one a thread; those of one bundle share its weights
public:
    Images sample(const Request& request) {
        const std::size_t num = request.num ? request.num : request.labels.empty() ? 1 : request.labels.size();
        Images images{shape_, {}};
        images.shape.insert(images.shape.begin(), static_cast<std::int64_t>(num));
        images.data.resize(num * size_);
        auto progress = [](void* user, std::size_t done, std::size_t total) noexcept {
            static_cast<const Request*>(user)->on_step(done, total);
        };
        diffx_request raw;
        diffx_request_init(&raw, sizeof raw);
        if (!request.labels.empty()) raw.labels = request.labels.data(), raw.num_labels = request.labels.size();
        if (!request.sampler.empty()) raw.sampler = request.sampler.c_str();
        if (request.on_step) raw.on_step = progress, raw.user = const_cast<Request*>(&request);
        raw.num = num, raw.steps = request.steps, raw.guidance_scale = request.guidance_scale;
        raw.seed = request.seed, raw.first = request.first, raw.batch = request.batch;
        check(diffx_sample(handle_.get(), &raw, images.data.data(), images.data.size()));
        return images;
    }
    std::string device() const { return diffx_sampler_device(handle_.get()); }
    diffx_sampler* get() const { return handle_.get(); }

private:
    friend class Bundle;
    Sampler(diffx_sampler* handle, std::vector<std::int64_t> shape) : handle_(handle), shape_(std::move(shape)) {
        for (auto side : shape_) size_ *= static_cast<std::size_t>(side);
    }
    struct Free {
        void operator()(diffx_sampler* handle) const { diffx_sampler_free(handle); }
    };
    std::unique_ptr<diffx_sampler, Free> handle_;
    std::vector<std::int64_t> shape_;
    std::size_t size_ = 1;
};

class Bundle { // may be used from several threads
public:
    explicit Bundle(const std::string& path) {
        diffx_bundle* handle = nullptr;
        check(diffx_bundle_open(path.c_str(), &handle));
        handle_.reset(handle);
    }
    Sampler sampler(Backend backend, int threads = 0) const { // 0: every core that this process may use
        static constexpr const char* names[] = {"ort", "ort-cuda", "openvino", "trt", "trt-rtx"};
        return sampler(names[static_cast<int>(backend)], {sizeof(diffx_options), threads, 0, 0, 0});
    }
    Sampler sampler(const char* backend, const diffx_options& options) const {
        diffx_sampler* handle = nullptr;
        check(diffx_sampler_open(handle_.get(), backend, &options, &handle));
        return {handle, shape()};
    }
    std::vector<std::int64_t> shape() const { // of one image
        std::int64_t sides[3];
        return {sides, sides + diffx_bundle_shape(handle_.get(), sides)};
    }
    diffx_bundle* get() const { return handle_.get(); }

private:
    struct Free {
        void operator()(diffx_bundle* handle) const { diffx_bundle_free(handle); }
    };
    std::unique_ptr<diffx_bundle, Free> handle_;
};

} // namespace diffx
