#include "backends/buffers.hpp"

#include <algorithm>

namespace diffx::core {

BufferedState::BufferedState(std::unique_ptr<Memory> memory, const Manifest& manifest, std::size_t batch)
    : memory_(std::move(memory)), noise_(batch * manifest.size) {
    std::vector<std::int64_t> shape{static_cast<std::int64_t>(batch)};
    shape.insert(shape.end(), manifest.shape.begin(), manifest.shape.end());
    const std::size_t bytes = noise_.size() * sizeof(float);
    for (const char* name : {"x", "x_next", "h", "h_next", "z"}) slots_.push_back({name, shape, false, bytes, nullptr});
    slots_.push_back({"row", {kColumns}, false, sizeof(Row), nullptr});
    if (manifest.num_classes > 0) slots_.push_back({"label", {shape[0]}, true, batch * sizeof(std::int64_t), nullptr});
    for (Slot& slot : slots_) {
        slot.buffer = memory_->allocate(slot.bytes);
        memory_->clear(*slot.buffer, slot.bytes);
    }
}

std::size_t BufferedState::place(std::string_view name, bool back) const {
    const bool next = name.ends_with("_next");
    const std::string_view stem = next ? name.substr(0, 1) : name;
    const bool second = (stem == "x" || stem == "h") && next != back;
    const auto found = std::ranges::find_if(slots_, [&](const Slot& slot) {
        return slot.name.starts_with(stem) && slot.name.ends_with("_next") == second;
    });
    return static_cast<std::size_t>(found - slots_.begin());
}

void BufferedState::begin(std::span<const float> x, std::span<const std::int64_t> labels, std::span<const float> h) {
    back_ = false;
    memory_->upload(*slot("x").buffer, x.data(), x.size_bytes());
    if (h.empty())
        memory_->clear(*slot("h").buffer, slot("h").bytes);
    else
        memory_->upload(*slot("h").buffer, h.data(), h.size_bytes());
    if (!labels.empty()) memory_->upload(*slot("label").buffer, labels.data(), labels.size_bytes());
}

void BufferedState::step(const Row& row) {
    memory_->upload(*slot("row").buffer, row.data(), sizeof row);
    if (row[kNoise] != 0) memory_->upload(*slot("z").buffer, noise_.data(), slot("z").bytes);
    run(step_graph(row[kGuidance]), back_);
    back_ = !back_;
}

void BufferedState::read(std::span<float> x, std::span<float> h) {
    if (!x.empty()) memory_->download(x.data(), *slot("x", back_).buffer, x.size_bytes());
    if (!h.empty()) memory_->download(h.data(), *slot("h", back_).buffer, h.size_bytes());
}

} // namespace diffx::core
