// diffx-sample: images from a bundle on the command line.
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>

#include "arguments.hpp"
#include "diffx.hpp"
#include "picture.hpp"

namespace {

double seconds_since(std::chrono::steady_clock::time_point started) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
}

std::int64_t label_of(const diffx::Bundle& bundle, const std::string& text) {
    const std::int64_t count = diffx_bundle_num_classes(bundle.get());
    for (std::int64_t label = 0; label < count; ++label) {
        const char* name = diffx_bundle_label_name(bundle.get(), label);
        if (text == (name != nullptr ? name : "") || text == std::to_string(label)) return label;
    }
    throw std::invalid_argument("label '" + text + "': this model has labels 0.." + std::to_string(count - 1));
}

/// One label for each image; empty for a model without labels.
std::vector<std::int64_t> labels_of(const diffx::Bundle& bundle, const Arguments& arguments) {
    const std::int64_t count = diffx_bundle_num_classes(bundle.get());
    if (count == 0) {
        if (arguments.labels || arguments.per_label)
            throw std::invalid_argument("--labels, --per-label: this model has no labels; use --num");
        return {};
    }
    std::vector<std::int64_t> given;
    const std::string text = arguments.labels.value_or("all");
    if (text == "all")
        for (std::int64_t label = 0; label < count; ++label) given.push_back(label);
    else
        for (std::size_t start = 0, stop = 0; stop != std::string::npos; start = stop + 1) {
            stop = text.find(',', start);
            const std::string part = text.substr(start, stop == std::string::npos ? stop : stop - start);
            const std::size_t dash = part.find('-', 1);
            const bool range = part.find_first_not_of("0123456789-") == std::string::npos && dash != std::string::npos;
            const std::int64_t low = label_of(bundle, range ? part.substr(0, dash) : part);
            const std::int64_t high = range ? label_of(bundle, part.substr(dash + 1)) : low;
            for (std::int64_t label = low; label <= high; ++label) given.push_back(label);
        }
    std::size_t num = arguments.num.value_or(arguments.labels ? given.size() : std::min<std::size_t>(given.size(), 16));
    if (arguments.per_label) {
        if (arguments.num) throw std::invalid_argument("--per-label: give it without --num");
        num = given.size() * *arguments.per_label;
    }
    std::vector<std::int64_t> labels(num);
    for (std::size_t k = 0; k < num; ++k) labels[k] = given[k % given.size()];
    return labels;
}

/// Write a file beside its place and move it there, so that there is never half of one.
void write_file(const std::string& path, const std::function<void(const std::string&)>& write) {
    const std::string work = path + "." + std::to_string(getpid()) + ".tmp";
    try {
        write(work);
        std::filesystem::rename(work, path);
    } catch (...) {
        std::error_code ignored;
        std::filesystem::remove(work, ignored);
        throw;
    }
}

/// NumPy's format, version 1.0.
void write_npy(const diffx::Images& images, const std::string& path) {
    std::string header = "{'descr': '<f4', 'fortran_order': False, 'shape': (";
    for (const std::int64_t side : images.shape) header += std::to_string(side) + ", ";
    header += ")}";
    header.resize((header.size() + 10 + 64) / 64 * 64 - 11, ' ');
    header += '\n';
    std::ofstream file(path, std::ios::binary);
    file << "\x93NUMPY\x01" << '\0' << static_cast<char>(header.size() & 255) << static_cast<char>(header.size() >> 8)
         << header;
    file.write(reinterpret_cast<const char*>(images.data.data()),
               static_cast<std::streamsize>(images.data.size() * sizeof(float)));
    if (!file.flush()) throw std::runtime_error(path + ": cannot be written (" + std::strerror(errno) + ")");
}

/// A text as JSON has it.
std::string json_text(const std::string& text) {
    std::string result = "\"";
    for (const char letter : text) {
        if (letter == '"' || letter == '\\') result += '\\';
        if (static_cast<unsigned char>(letter) >= ' ') result += letter;
    }
    return result + '"';
}

void print_finding(void* json, const diffx_finding* f) {
    const char* verdict = f->passed ? "ok" : "FAILED";
    if (*static_cast<bool*>(json))
        std::printf("{\"check\": \"%s\", \"passed\": %s, \"relative_l2\": %.6g, \"max_abs\": %.6g, \"psnr\": %s, "
                    "\"limit\": %.6g, \"seconds_per_step\": %.6g}\n",
                    f->name, f->passed ? "true" : "false", f->relative_l2, f->max_abs,
                    std::isfinite(f->psnr) ? std::to_string(f->psnr).c_str() : "null", f->limit, f->seconds_per_step);
    else if (f->held_by_psnr)
        std::printf("%-6s %-14s PSNR %.1f dB (limit %g), relative L2 %.1e, largest difference %.1e, %.3f ms a step\n",
                    verdict, f->name, f->psnr, f->limit, f->relative_l2, f->max_abs, 1e3 * f->seconds_per_step);
    else
        std::printf("%-6s %-14s relative L2 %.1e (limit %g), largest difference %.1e, %.3f ms a step\n", verdict,
                    f->name, f->relative_l2, f->limit, f->max_abs, 1e3 * f->seconds_per_step);
}

void run(Arguments& arguments) {
    const auto started = std::chrono::steady_clock::now();
    const diffx::Bundle bundle(arguments.bundle);
    const diffx_options options{.size = sizeof options,
                                .threads = arguments.threads,
                                .device = arguments.device,
                                .selftest = arguments.believed || arguments.selftest ? -1 : 0,
                                .cuda_graph = arguments.cuda_graph ? 0 : -1};
    auto sampler = bundle.sampler(arguments.backend.c_str(), options);
    if (arguments.selftest) {
        diffx::check(diffx_selftest(sampler.get(), print_finding, &arguments.json));
        if (!arguments.json)
            std::printf("all golden cases agree on %s (%s)\n", arguments.backend.c_str(), sampler.device().c_str());
        return;
    }
    diffx::Request request{.labels = labels_of(bundle, arguments),
                           .num = 0,
                           .sampler = arguments.sampler,
                           .steps = arguments.steps,
                           .guidance_scale = arguments.guidance_scale,
                           .seed = arguments.seed,
                           .first = arguments.first,
                           .batch = arguments.batch};
    if (request.labels.empty()) request.num = arguments.num.value_or(16);
    if (isatty(STDERR_FILENO) != 0)
        request.on_step = [](std::size_t done, std::size_t total) {
            std::fprintf(stderr, "\rsampling %3zu %%%s", 100 * done / total, done == total ? "\n" : "");
        };
    const auto loaded = std::chrono::steady_clock::now();
    const diffx::Images images = sampler.sample(request);
    const double seconds = seconds_since(loaded);

    std::vector<std::string> written;
    if (arguments.out.empty() && arguments.npy.empty())
        arguments.out = std::string(diffx_bundle_name(bundle.get())) + ".png";
    if (!arguments.out.empty()) {
        const std::size_t columns = arguments.per_label ? request.labels.size() / *arguments.per_label : 0;
        write_file(arguments.out, [&](const std::string& path) { write_picture(images, columns, path); });
        written.push_back(arguments.out);
    }
    if (!arguments.npy.empty()) {
        write_file(arguments.npy, [&](const std::string& path) { write_npy(images, path); });
        written.push_back(arguments.npy);
    }
    if (arguments.json) {
        std::string files;
        for (const std::string& path : written) files.append(files.empty() ? "" : ", ").append(json_text(path));
        std::printf("{\"samples\": %lld, \"backend\": %s, \"device\": %s, \"seed\": %llu, \"seconds\": %.6f, "
                    "\"seconds_in_all\": %.6f, \"written\": [%s]}\n",
                    static_cast<long long>(images.shape[0]), json_text(arguments.backend).c_str(),
                    json_text(sampler.device()).c_str(), static_cast<unsigned long long>(arguments.seed), seconds,
                    seconds_since(started), files.c_str());
        return;
    }
    std::printf("%lld images on %s (%s), %.2f s\n", static_cast<long long>(images.shape[0]), arguments.backend.c_str(),
                sampler.device().c_str(), seconds);
    for (const std::string& path : written) std::printf("wrote %s\n", path.c_str());
}

} // namespace

int main(int count, char** words) {
    try {
        Arguments arguments = parse_arguments(count, words);
        run(arguments);
        return 0;
    } catch (const std::invalid_argument& problem) {
        std::fprintf(stderr, "diffx-sample: error: %s\n", problem.what());
        return 2;
    } catch (const std::exception& problem) {
        std::fprintf(stderr, "diffx-sample: error: %s\n", problem.what());
        return 1;
    }
}
