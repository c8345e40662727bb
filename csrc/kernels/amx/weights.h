// Where the products of a pair of panels find its lines: in the mapped file, or expanded from int4.
//
// A source of weights brings the next pair while this one is multiplied: `start` begins with it, `step` runs between
// the tile products and does a part, `take` does the rest and gives the lines, valid until the next `take`.
#pragma once

#include "kernels/amx/blocking.h"
#include "kernels/epilogue-inl.h"
#include "kernels/fully_connected-inl.h"

namespace chatglm::CHATGLM_AMX_LEVEL {
namespace {

inline Floats floats_of(Ints v) {
    return __builtin_convertvector(v, Floats);
}

// A pair of panels in a block of columns.
struct PairLines {
    const uint8_t* panel[2];        // lines of 64 bytes, 16 of them a tile
    const float* scales = nullptr;  // [2 panels][16], of the block, in formats that have such
};

// Lines that are multiplied as they lie; the next pair's are prefetched into L2.
class MappedWeights {
public:
    MappedWeights(const FullyConnectedTask& task, const Blocks& blocks)
        : weight_(task.weight),
          panel_bytes_(task.layout.panel_bytes()),
          column_bytes_(panel_bytes_ / blocks.padded_in),
          blocks_(blocks) {}

    void start(const PairBlock& pair, int64_t steps) {
        const uint8_t* first = weight_ + pair.panel * panel_bytes_ + pair.block * blocks_.columns * column_bytes_;
        next_ = {{first, first + (pair.panels == 2 ? panel_bytes_ : 0)}};
        done_ = 0;
        bytes_ = pair.panels == 0 ? 0 : blocks_.columns_of(pair.block) * column_bytes_;
        step_bytes_ = round_up((bytes_ + steps - 1) / steps, kLineBytes);
    }

    void step() {
        const int64_t end = std::min(done_ + step_bytes_, bytes_);
        for (; done_ < end; done_ += kLineBytes) {
            for (const uint8_t* panel : next_.panel) _mm_prefetch(panel + done_, _MM_HINT_T1);
        }
    }

    PairLines take() const { return next_; }

private:
    const uint8_t* weight_;
    int64_t panel_bytes_, column_bytes_;
    Blocks blocks_;
    PairLines next_{};
    int64_t done_ = 0, bytes_ = 0, step_bytes_ = 0;
};

// int4 lines, expanded to other lines by `Format`, which has
//   kBlockColumns       the columns of its Blocks, a multiple of all group sizes
//   kExpandedBytes      what one line of int4, 8 columns, becomes
//   Factors             of one group of a panel
//   make_factors(scales [groups][16], zero_points [groups][16], groups, Factors[groups], block scales [16])
//   expand(line, Factors, out)
template <typename Format>
class ExpandedWeights {
public:
    ExpandedWeights(const FullyConnectedTask& task, const Blocks& blocks)
        : layout_(task.layout), weight_(task.weight), blocks_(blocks), group_shift_(shift_of(layout_.group_size)) {}

    // All lines are prefetched before the first is expanded: too many in too short a time for the processor to do it.
    // Out of line, as GCC 12 fails where it is not.
    [[gnu::noinline]] void start(const PairBlock& pair, int64_t steps) {
        turn_ ^= 1;
        panels_ = pair.panels;
        panel_ = line_ = 0;
        if (panels_ == 0) return void(to_expand_ = left_ = 0);
        const int64_t columns = blocks_.columns_of(pair.block), first_column = pair.block * blocks_.columns;
        lines_ = columns / kLineColumns;
        to_expand_ = panels_ * lines_;
        left_ = 2 * to_expand_;
        step_lines_ = (left_ + steps - 1) / steps;
        for (int64_t panel = 0; panel < panels_; ++panel) {
            const int64_t at = pair.panel + panel, group = first_column / layout_.group_size;
            from_[panel] = layout_.panel(weight_, at) + first_column / kLineColumns * kLineBytes;
            // What pads K has scales that mean nothing: its factors make zeros.
            const int64_t groups = std::min(columns, layout_.in_features - first_column) / layout_.group_size;
            Format::make_factors(layout_.group_scales(weight_, at) + group * kPanel,
                                 layout_.zero_points(weight_, at) + group * kPanel, groups, factors_[panel],
                                 scales_[turn_][panel]);
            std::fill(factors_[panel] + groups, factors_[panel] + kMostGroups, typename Format::Factors{});
        }
    }

    void step() {
        if (left_ > 0) run(step_lines_);
    }

    PairLines take() {
        run(left_);
        return {{lines_of_[turn_][0], lines_of_[turn_][panels_ - 1]}, scales_[turn_][0]};
    }

private:
    static constexpr int64_t kLineColumns = 8, kMostGroups = Format::kBlockColumns / 32;

    // Lines of a group are 4, 8 or 16: a division a line would take as long as the rest.
    static int shift_of(int64_t group_size) { return group_size == 32 ? 2 : group_size == 64 ? 3 : 4; }

    // Out of line, so that the loop over tiles keeps its registers.
    [[gnu::noinline]] void run(int64_t count) {
        for (; count > 0 && left_ > 0; --count, --left_) {
            const uint8_t* line = from_[panel_] + line_ * kLineBytes;
            if (left_ > to_expand_) {
                _mm_prefetch(line, _MM_HINT_T0);
            } else {
                Format::expand(line, factors_[panel_][line_ >> group_shift_],
                               lines_of_[turn_][panel_] + line_ * Format::kExpandedBytes);
            }
            if (++line_ == lines_) {
                line_ = 0;
                panel_ = panel_ + 1 < panels_ ? panel_ + 1 : 0;
            }
        }
    }

    const PackedLayout layout_;
    const uint8_t* weight_;
    const Blocks blocks_;
    const int group_shift_;
    int turn_ = 0;
    int64_t panels_ = 0, lines_ = 0, to_expand_ = 0, left_ = 0, step_lines_ = 0;
    int64_t panel_ = 0, line_ = 0;  // what is next
    const uint8_t* from_[2] = {};
    typename Format::Factors factors_[2][kMostGroups];
    // [turn][panel]: of the pair that is multiplied, and of the next one.
    alignas(64) float scales_[2][2][kPanel] = {};
    alignas(64) uint8_t lines_of_[2][2][Format::kBlockColumns / kLineColumns * Format::kExpandedBytes];
};

}  // namespace
}  // namespace chatglm::CHATGLM_AMX_LEVEL
