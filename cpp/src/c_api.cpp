// The C interface: every exception becomes a status and a message.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <utility>

#include "diffx.h"
#include "error.hpp"
#include "sampler.hpp"

struct diffx_bundle {
    std::shared_ptr<const diffx::core::Bundle> bundle;
};
struct diffx_sampler {
    diffx::core::Sampler sampler;
};

namespace {

using namespace diffx::core;

/// A message in memory that exists before anything can go wrong.
thread_local char last_error[2048] = "";

diffx_status failed(diffx_status status, const char* message) noexcept {
    std::strncpy(last_error, message, sizeof last_error - 1);
    return status;
}

template <typename Call>
diffx_status guarded(const Call& call) noexcept {
    try {
        call();
        return DIFFX_OK;
    } catch (const Error& problem) {
        return failed(problem.status, problem.what());
    } catch (const std::bad_alloc&) {
        return failed(DIFFX_INTERNAL_ERROR, "out of memory");
    } catch (const std::exception& problem) {
        return failed(DIFFX_INTERNAL_ERROR, problem.what());
    } catch (...) {
        return failed(DIFFX_INTERNAL_ERROR, "an exception of an unknown kind");
    }
}

template <typename Pointed>
void required(const Pointed* pointer, const char* name) {
    if (pointer == nullptr) throw error(DIFFX_SHAPE_ERROR, name, ": got NULL");
}

/// A caller's struct, of which it may know fewer fields than this library does: the rest is 0.
template <typename Struct>
Struct known(const Struct* given) {
    Struct full{};
    std::memcpy(&full, given, std::min(given->size, sizeof full));
    return full;
}

} // namespace

const char* diffx_last_error(void) {
    return last_error;
}
const char* diffx_version(void) {
    return DIFFX_VERSION;
}
const char* diffx_backends(void) {
    return backend_names();
}

diffx_status diffx_bundle_open(const char* path, diffx_bundle** bundle) {
    return guarded([&] {
        required(path, "path"), required(bundle, "bundle");
        *bundle = new diffx_bundle{std::make_shared<const Bundle>(path)};
    });
}

void diffx_bundle_free(diffx_bundle* bundle) {
    delete bundle;
}

const char* diffx_bundle_name(const diffx_bundle* bundle) {
    return bundle->bundle->manifest().name.c_str();
}

size_t diffx_bundle_shape(const diffx_bundle* bundle, int64_t shape[3]) {
    const auto& sides = bundle->bundle->manifest().image_shape;
    std::ranges::copy(sides, shape);
    return sides.size();
}

int64_t diffx_bundle_num_classes(const diffx_bundle* bundle) {
    return bundle->bundle->manifest().num_classes;
}

const char* diffx_bundle_label_name(const diffx_bundle* bundle, int64_t label) {
    const auto& names = bundle->bundle->manifest().label_names;
    return label < 0 || std::cmp_greater_equal(label, names.size()) ? nullptr
                                                                    : names[static_cast<std::size_t>(label)].c_str();
}

diffx_status diffx_sampler_open(diffx_bundle* bundle, const char* backend, const diffx_options* options,
                                diffx_sampler** sampler) {
    return guarded([&] {
        required(bundle, "bundle"), required(backend, "backend"), required(sampler, "sampler");
        const diffx_options given = options == nullptr ? diffx_options{} : known(options);
        if (given.threads < 0 || given.device < 0)
            throw error(DIFFX_BACKEND_ERROR, "threads ", given.threads, ", device ", given.device,
                        ": expected 0 or more");
        const bool tested = given.selftest > 0 || (given.selftest == 0 && compiles(backend));
        const Options chosen{.threads = given.threads, .device = given.device, .cuda_graph = given.cuda_graph >= 0};
        *sampler = new diffx_sampler{Sampler(bundle->bundle, backend, chosen, tested)};
    });
}

void diffx_sampler_free(diffx_sampler* sampler) {
    delete sampler;
}

const char* diffx_sampler_device(const diffx_sampler* sampler) {
    return sampler->sampler.device().c_str();
}

void diffx_request_init(diffx_request* request, size_t size) {
    diffx_request defaults{};
    defaults.size = size;
    defaults.num = 1;
    defaults.guidance_scale = std::nan("");
    std::memset(request, 0, size);
    std::memcpy(request, &defaults, std::min(size, sizeof defaults));
}

diffx_status diffx_sample(diffx_sampler* sampler, const diffx_request* request, float* images, size_t capacity) {
    return guarded([&] {
        required(sampler, "sampler"), required(request, "request"), required(images, "images");
        const diffx_request given = known(request);
        sampler->sampler.sample(
            {.labels = given.labels == nullptr ? std::span<const int64_t>() : std::span(given.labels, given.num_labels),
             .num = given.num,
             .sampler = given.sampler == nullptr ? "" : given.sampler,
             .steps = given.steps,
             .guidance_scale = given.guidance_scale,
             .seed = given.seed,
             .first = given.first,
             .batch = given.batch,
             .on_step = given.on_step,
             .user = given.user},
            {images, capacity});
    });
}

diffx_status diffx_selftest(diffx_sampler* sampler, void (*report)(void* user, const diffx_finding* finding),
                            void* user) {
    return guarded([&] {
        required(sampler, "sampler");
        const auto findings = sampler->sampler.selftest();
        for (const auto& f : findings) {
            const diffx_finding shown{sizeof shown, f.name.c_str(), f.passed, f.held_by_psnr,    f.relative_l2,
                                      f.max_abs,    f.psnr,         f.limit,  f.seconds_per_step};
            if (report != nullptr) report(user, &shown);
        }
        require_passed(findings, sampler->sampler.device());
    });
}
