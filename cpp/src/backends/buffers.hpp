// What backends share: the graphs of a bundle, loaded when first asked for, and the buffers that steps read and write.
#pragma once

#include <array>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "backend.hpp"
#include "backends/memory.hpp"
#include "bundle.hpp"

namespace diffx::core {

/// Graphs as a backend has them, each loaded once, by whichever thread needs it first.
template <typename Graph>
class Graphs {
public:
    template <typename Load>
    Graph& get(std::size_t which, const Load& load) {
        const std::scoped_lock lock(mutex_);
        if (!graphs_[which]) graphs_[which] = load(which);
        return *graphs_[which];
    }

private:
    std::mutex mutex_;
    std::array<std::unique_ptr<Graph>, kGraphs.size()> graphs_;
};

/// An input or output of the step graphs.
struct Slot {
    std::string_view name;
    std::vector<std::int64_t> shape;
    bool integers; // int64; float32 otherwise
    std::size_t bytes;
    std::unique_ptr<Buffer> buffer;
};

/// A state in seven buffers: x and h have two each, of which a step reads one and writes the other.
class BufferedState : public State {
public:
    BufferedState(std::unique_ptr<Memory> memory, const Manifest& manifest, std::size_t batch);

    void begin(std::span<const float> x, std::span<const std::int64_t> labels, std::span<const float> h) final;
    std::span<float> noise() final { return noise_; }
    void step(const Row& row) final;
    void read(std::span<float> x, std::span<float> h) final;

protected:
    /// Run kPlain or kGuided; from the second buffers to the first where back, else from the first to the second.
    virtual void run(std::size_t graph, bool back) = 0;

    const std::vector<Slot>& slots() const { return slots_; }
    /// Place in slots() of the buffer for an input or output of a step graph ("x", "x_next", "row").
    std::size_t place(std::string_view name, bool back) const;
    Memory& memory() { return *memory_; }

private:
    Slot& slot(std::string_view name, bool back = false) { return slots_[place(name, back)]; }

    std::unique_ptr<Memory> memory_;
    std::vector<Slot> slots_;
    std::vector<float> noise_;
    bool back_ = false;
};

} // namespace diffx::core
