// Packed int8 and int4 weights, as the kernels that multiply bytes by VNNI read them.
//
// Included by kernels/fully_connected_vnni-inl.h only; everything here has internal linkage, see simd-inl.h.
#pragma once

#include "kernels/fully_connected-inl.h"
#include "kernels/vnni-inl.h"

namespace chatglm {
namespace {

// The packed weight, from its first panel on.
struct Weight {
    const uint8_t* codes;
    int64_t panel_bytes;
    const uint16_t* scales;      // int4: [panel][group][16]
    const uint8_t* zero_points;  // int4: [panel][group][16]
    int64_t groups;

    explicit Weight(const FullyConnectedTask& task)
        : codes(task.weight), panel_bytes(task.layout.panel_bytes()) {
        if (task.layout.format != WeightFormat::int4) return;
        scales = task.layout.group_scales(task.weight, 0);
        zero_points = task.layout.zero_points(task.weight, 0);
        groups = task.layout.groups();
    }
};

// int8: a line of codes is 4 columns, a group is a block.
struct Int8 {
    static constexpr int kStep = 4;  // columns of a line
    // Registers for the sums of a stream. Measured: with more, where the codes of x come from the second-level cache for
    // each panel, Zen 5 is slower than in tiles where the memory is fast, Zen 4 as fast.
    static constexpr int kStreamSums = 16;

    static Bytes codes(Bytes line, int) { return line; }
    static int64_t group_columns(const PackedLayout&, int64_t block_columns) { return block_columns; }
    static int64_t first_group(const PackedLayout&, int64_t block) { return block; }
    // The codes are too large by 128.
    static int32_t correction(int32_t sum_of_x) { return -128 * sum_of_x; }

    // Of a piece of a panel: what its accumulators start from, and the factor of the weight beside that of x.
    struct Group {
        static void prefetch(const PackedLayout&, const Weight&, int64_t, int64_t, int64_t) {}
        void load(const Weight&, int64_t, int64_t, int) {}
        Ints start(int32_t correction) const { return Ints{} + correction; }
        Floats scale(float activation) const { return broadcast(activation); }
    };
};

// int4: a line of codes is 8 columns, the first four in the low nibbles.
struct Int4 {
    static constexpr int kStep = 8;
    static constexpr int kStreamSums = 24;

    static Bytes codes(Bytes line, int part) { return part ? high_nibbles(line) : low_nibbles(line); }
    static int64_t group_columns(const PackedLayout& layout, int64_t) { return layout.group_size; }
    static int64_t first_group(const PackedLayout& layout, int64_t block) {
        return block * (kActivationBlock / layout.group_size);
    }
    // Two words of 16 bits, which a zero point and 128 times it meet: the sum has up to 23 bits.
    static int32_t correction(int32_t sum_of_x) {
        const int32_t high = -sum_of_x >> 7, low = -sum_of_x & 127;
        return high * 65536 + low;
    }

    struct Group {
        Ints zero_points;  // each beside 128 times itself, in words of 16 bits
        Floats scales;

        // Those that are due so many bytes of codes later: short streams, which the processor does not find by itself.
        [[gnu::always_inline]] static void prefetch(const PackedLayout& layout, const Weight& weight, int64_t panel,
                                                    int64_t group, int64_t ahead) {
            const int64_t groups = ahead / kLineBytes * kStep / layout.group_size;
            const int64_t at = (panel * weight.groups + group + groups) * kPanel;
            _mm_prefetch(weight.scales + at, _MM_HINT_T0);
            _mm_prefetch(weight.zero_points + at, _MM_HINT_T0);
        }
        void load(const Weight& weight, int64_t panel, int64_t group, int piece) {
            const int64_t at = (panel * weight.groups + group) * kPanel + piece * kLanes;
            zero_points = widen_bytes(weight.zero_points + at);
            zero_points |= zero_points << 23;
            scales = widen_halves(weight.scales + at);
        }
        Ints start(int32_t correction) const { return multiply_words(zero_points, correction); }
        Floats scale(float activation) const { return scales * broadcast(activation); }
    };
};

}  // namespace
}  // namespace chatglm
