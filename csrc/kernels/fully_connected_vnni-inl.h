// FullyConnected for int8 and int4 weights: unsigned codes in registers times signed bytes of x from memory (VNNI).
//
// Included by kernels/<level>/fully_connected*.cpp only; everything here has internal linkage, see simd-inl.h.
//
// A tile is a few rows by 1, 2 or 4 panels by the planes of x (high and low byte with 16-bit activations), one int32
// accumulator each. A tile walks over one block of K; its rows are packed so that one pointer serves them all. With few
// rows several panels side by side keep as many streams from memory; with many, the codes of two panels stay in the
// first-level cache while all rows pass.
#pragma once

#include "kernels/epilogue-inl.h"
#include "kernels/fully_connected-inl.h"
#include "kernels/memory.h"
#include "kernels/vnni-inl.h"

namespace chatglm {
namespace {

// Accumulators of the largest tile, in lines: 24 registers of 32, or 12 of 16.
constexpr int kAccumulators = kPieces == 1 ? 24 : 6;

// How far ahead weights are prefetched into the second-level cache, and from how many operations a line on: the
// processor's own prefetcher does not run ahead of a loop that fills its queues with what waits for each line. Fewer
// lose by it, as these requests hold miss buffers of the first level too. Measured: int4 with 16-bit activations, or
// with two rows and more, gains; int4 with one row of 8-bit activations and int8 lose.
constexpr int64_t kFarBytes = 2560;
constexpr int kFarOperations = 6;

// Panels side by side where the rows are few, and where they are many.
constexpr int kFewRowsPanels = kPieces == 1 ? 4 : 2, kManyRowsPanels = kPieces == 1 ? 2 : 1;
// Products of rows and planes that the first are for: with more there are not enough registers.
constexpr int kFewProducts = kPieces == 1 ? 4 : 2;

// Rows of a full tile.
constexpr int tile_rows(int planes, int panels = kManyRowsPanels) {
    return (panels == kFewRowsPanels ? kFewProducts : kAccumulators / kManyRowsPanels) / planes;
}

// What `prepare` makes of x, for R rows and B blocks. Sections, each from a multiple of 64 bytes on:
//   codes        int8 [block][tile of rows][K / 4][row of the tile][plane][4]
//   scales       float [B][R]
//   corrections  int32 [group][R][plane]: sums of the plane's codes over a group. int8, where a group is a block:
//                times -128, as the unsigned codes are too large by 128. int4: negative, for the zero point.
struct Prepared {
    int64_t rows, planes, blocks, bytes;
    int8_t* codes;
    float* scales;
    int32_t* corrections;

    Prepared(const void* prepared, const PackedLayout& layout, int64_t rows, int activation_bits)
        : rows(rows), planes(activation_bits / 8), blocks(activation_blocks(layout)) {
        const int64_t groups = layout.format == WeightFormat::int4 ? layout.groups() : blocks;
        const int64_t code_bytes = layout.padded_in() * rows * planes;
        const int64_t scale_bytes = round_up(blocks * rows * 4, kLineBytes);
        bytes = code_bytes + scale_bytes + groups * rows * planes * 4;
        codes = static_cast<int8_t*>(const_cast<void*>(prepared));
        scales = reinterpret_cast<float*>(codes + code_bytes);
        corrections = reinterpret_cast<int32_t*>(codes + code_bytes + scale_bytes);
    }

    // Codes of the rows from `row`, the first of a tile, in a block of that many columns.
    int8_t* tile(int64_t block, int64_t row, int64_t columns) const {
        return codes + (block * kActivationBlock * rows + row * columns) * planes;
    }
    float& scale(int64_t block, int64_t row) const { return scales[block * rows + row]; }
    int32_t* correction(int64_t group, int64_t row) const { return corrections + (group * rows + row) * planes; }
};

int64_t prepared_bytes(const PackedLayout& layout, int64_t rows, int activation_bits) {
    return Prepared(nullptr, layout, rows, activation_bits).bytes;
}

// One row of one block into its places: `out` at the row, `stride` bytes between its groups of 4 columns.
template <int kPlanes>
void pack_row(const int16_t* q, int64_t columns, int8_t* out, int64_t stride) {
    constexpr int64_t kWord = kPlanes * 4;
    alignas(kLineBytes) int8_t words[kLineBytes];
    for (int64_t k = 0; k < columns; k += kPackedColumns) {
        pack_planes<kPlanes>(q + k, words);
        for (int64_t i = 0; i < kPackedColumns / 4; ++i, out += stride) std::memcpy(out, words + i * kWord, kWord);
    }
}

template <int kPlanes>
void sum_group(const int16_t* q, int64_t columns, int32_t factor, int32_t* out) {
    int32_t total = 0, low = 0;
    for (int64_t k = 0; k < columns; ++k) {
        total += q[k];
        low += static_cast<int8_t>(q[k]);
    }
    out[kPlanes - 1] = factor * low;
    if constexpr (kPlanes == 2) out[0] = factor * ((total - low) >> 8);
}

template <int kPlanes>
void prepare_planes(const PackedLayout& layout, const Prepared& out, const float* x, int64_t x_stride, int64_t begin,
                    int64_t end) {
    constexpr int kRows = tile_rows(kPlanes);
    const bool int4 = layout.format == WeightFormat::int4;
    alignas(kLineBytes) int16_t q[kActivationBlock];
    for (int64_t row = begin; row < end; ++row) {
        const int64_t first = row / kRows * kRows, in_tile = std::min<int64_t>(kRows, out.rows - first);
        for (int64_t block = 0; block < out.blocks; ++block) {
            const int64_t start = block * kActivationBlock, columns = block_columns(layout, block);
            const int64_t count = std::min(columns, layout.in_features - start);
            out.scale(block, row) = quantize_block(x + row * x_stride + start, count, columns, kPlanes * 8, q);
            pack_row<kPlanes>(q, columns, out.tile(block, first, columns) + (row - first) * kPlanes * 4,
                              in_tile * kPlanes * 4);
            const int64_t group = int4 ? layout.group_size : columns;
            for (int64_t k = 0; k < columns; k += group) {
                const int64_t index = int4 ? (start + k) / group : block;
                sum_group<kPlanes>(q + k, group, int4 ? -1 : -128, out.correction(index, row));
            }
        }
    }
}

void prepare(const PackedLayout& layout, int64_t rows, int activation_bits, const float* x, int64_t x_stride,
             int64_t begin, int64_t end, void* prepared) {
    const Prepared out(prepared, layout, rows, activation_bits);
    if (activation_bits == 16) {
        prepare_planes<2>(layout, out, x, x_stride, begin, end);
    } else {
        prepare_planes<1>(layout, out, x, x_stride, begin, end);
    }
}

Bytes broadcast_bytes(const int8_t* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return broadcast_word(four);
}

// The packed weight, from its first panel on.
struct Weight {
    const uint8_t* codes;
    int64_t panel_bytes;
    const uint16_t* scales;      // int4: [panel][group][16]
    const uint8_t* zero_points;  // int4: [panel][group][16]
    int64_t groups, group_columns;

    explicit Weight(const FullyConnectedTask& task)
        : codes(task.weight), panel_bytes(task.layout.panel_bytes()) {
        if (task.layout.format != WeightFormat::int4) return;
        scales = task.layout.group_scales(task.weight, 0);
        zero_points = task.layout.zero_points(task.weight, 0);
        groups = task.layout.groups();
        group_columns = task.layout.group_size;
    }
};

// int8: a line of codes is 4 columns, a group is a block.
struct Int8 {
    static constexpr int kStep = 4;  // columns of a line

    // Of a line, with so many rows and planes of x.
    static constexpr int operations(int products) { return products; }

    static Bytes codes(Bytes line, int) { return line; }
    static int64_t group_columns(const Weight&, int64_t block_columns) { return block_columns; }
    static int64_t first_group(const Weight&, int64_t block) { return block; }

    // Of a piece of a panel: what its accumulators start from, and the factor of the weight beside that of x.
    struct Group {
        static void prefetch(const Weight&, int64_t, int64_t, int) {}
        void load(const Weight&, int64_t, int64_t, int) {}
        Ints start(int32_t correction) const { return Ints{} + correction; }
        Floats scale(float activation) const { return broadcast(activation); }
    };
};

// int4: a line of codes is 8 columns, the first four in the low nibbles.
struct Int4 {
    static constexpr int kStep = 8;

    static constexpr int operations(int products) { return 2 * products + 3; }
    static Bytes codes(Bytes line, int part) { return part ? high_nibbles(line) : low_nibbles(line); }
    static int64_t group_columns(const Weight& weight, int64_t) { return weight.group_columns; }
    static int64_t first_group(const Weight& weight, int64_t block) {
        return block * (kActivationBlock / weight.group_columns);
    }

    struct Group {
        Ints zero_points;
        Floats scales;

        // Of the scales and zero points of so many panels, which lie side by side, the part that is due when all groups
        // ask for theirs. Few rows pass over them faster than the processor finds these short streams.
        [[gnu::always_inline]] static void prefetch(const Weight& weight, int64_t panel, int64_t group, int panels) {
            const int64_t at = panel * weight.groups * kPanel, step = panels * kPanel;
            const uint16_t* scales = weight.scales + at + group * step;
            for (int64_t i = 0; i < step; i += kLineBytes / 2) _mm_prefetch(scales + i, _MM_HINT_T0);
            _mm_prefetch(weight.zero_points + at + group * step, _MM_HINT_T0);
        }

        void load(const Weight& weight, int64_t panel, int64_t group, int piece) {
            const int64_t at = (panel * weight.groups + group) * kPanel + piece * kLanes;
            zero_points = widen_bytes(weight.zero_points + at);
            scales = widen_halves(weight.scales + at);
        }
        // Both factors fit 16 bits: a sum is at most 128 * 128.
        Ints start(int32_t correction) const { return multiply_words(zero_points, correction & 0xffff); }
        Floats scale(float activation) const { return scales * broadcast(activation); }
    };
};

// One group of columns of a tile: where its parts lie.
struct GroupOfTile {
    int64_t columns;
    int64_t lines_behind;   // of each panel, after the group
    const uint8_t* weight;  // of the first panel
    int64_t panel_bytes;
    const int8_t* codes;
    const int32_t* corrections;  // [row][plane]
    const float* scales;         // [row]
};

// Accumulators of a tile, typed as the instruction has them: GCC 12 copies those of another type at each step.
template <int kRows, int kPanels, int kPlanes>
using TileSums = Ints[kRows][kPlanes][kPanels * kPieces];

// Prefetches for a line of a panel that is one of `panels` side by side, with so many lines of the panel left: behind
// its end comes the panel that is read after all of these.
[[gnu::always_inline]] inline void prefetch_far(const uint8_t* line, int64_t lines_left, int panels,
                                                int64_t panel_bytes) {
    const bool inside = lines_left > kFarBytes / kLineBytes;
    _mm_prefetch(line + (inside ? kFarBytes : kFarBytes + (panels - 1) * panel_bytes), _MM_HINT_T1);
}

// A line of codes of each panel. Loaded once, whatever is taken out of it: the compiler would load it again for the
// other nibbles.
template <int kOperations, int kPanels>
[[gnu::always_inline]] inline void load_lines(Bytes (&lines)[kPanels * kPieces], const uint8_t* weight,
                                              int64_t panel_bytes, int64_t lines_left) {
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p) {
        const uint8_t* line = weight + p * panel_bytes;
#pragma GCC unroll 2
        for (int i = 0; i < kPieces; ++i) {
            Bytes& piece = lines[p * kPieces + i];
            piece = load_bytes(line + i * kPieceBytes);
            asm volatile("" : "+v"(piece));
        }
        prefetch_near(line);
        if constexpr (kOperations >= kFarOperations && kPanels == kFewRowsPanels) {
            prefetch_far(line, lines_left, kPanels, panel_bytes);
        }
    }
}

// Adds the products of one line of codes of each panel, column group `part` of it.
template <typename Format, int kRows, int kPanels, int kPlanes>
[[gnu::always_inline]] inline void add_line(TileSums<kRows, kPanels, kPlanes>& sums,
                                            const Bytes (&lines)[kPanels * kPieces], const int8_t* codes, int part) {
    constexpr int kColumns = kPanels * kPieces;
    Bytes w[kColumns];
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) w[c] = Format::codes(lines[c], part);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int l = 0; l < kPlanes; ++l) {
            const Bytes four = broadcast_bytes(codes + ((part * kRows + r) * kPlanes + l) * 4);
#pragma GCC unroll 4
            for (int c = 0; c < kColumns; ++c) sums[r][l][c] = add_products(sums[r][l][c], w[c], four);
        }
    }
}

// Adds the scaled sums of a group to those of the tile, out [row][panel][16], rows `stride` floats apart.
template <typename Group, int kRows, int kPanels, int kPlanes>
[[gnu::always_inline]] inline void add_scaled(const TileSums<kRows, kPanels, kPlanes>& sums, const Group* factors,
                                              const float* activation_scales, int64_t stride, float* out) {
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r, out += stride) {
#pragma GCC unroll 4
        for (int c = 0; c < kPanels * kPieces; ++c) {
            Floats total = __builtin_convertvector(sums[r][kPlanes - 1][c], Floats);
            if constexpr (kPlanes == 2) {
                total = multiply_add(__builtin_convertvector(sums[r][0][c], Floats), broadcast(256.0f), total);
            }
            float* at = out + c * kLanes;
            store(at, multiply_add(total, factors[c].scale(activation_scales[r]), load(at)));
        }
    }
}

// Adds the products of one group to the sums [row][panel][16] of a tile.
template <typename Format, int kRows, int kPanels, int kPlanes>
[[gnu::always_inline]] inline void multiply_group(const GroupOfTile& group, const typename Format::Group* factors,
                                                  Ahead& ahead, int64_t stride, float* out) {
    TileSums<kRows, kPanels, kPlanes> sums;
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int l = 0; l < kPlanes; ++l) {
#pragma GCC unroll 4
            for (int c = 0; c < kPanels * kPieces; ++c) {
                sums[r][l][c] = factors[c].start(group.corrections[r * kPlanes + l]);
            }
        }
    }
    const uint8_t* weight = group.weight;
    const int8_t* codes = group.codes;
    int64_t steps = group.columns / Format::kStep;
    do {
        Bytes lines[kPanels * kPieces];
        load_lines<Format::operations(kRows * kPlanes), kPanels>(lines, weight, group.panel_bytes,
                                                                 steps + group.lines_behind);
        if constexpr (kPanels != kFewRowsPanels) ahead.step<kPanels>();
#pragma GCC unroll 2
        for (int part = 0; part < Format::kStep / 4; ++part) {
            add_line<Format, kRows, kPanels, kPlanes>(sums, lines, codes, part);
        }
        weight += kLineBytes;
        codes += Format::kStep * kRows * kPlanes;
    } while (--steps > 0);
    add_scaled<typename Format::Group, kRows, kPanels, kPlanes>(sums, factors, group.scales, stride, out);
}

// A block of K of a tile.
struct BlockOfTile {
    int64_t block, columns, panel, row;
};

// Adds the products of one block to the sums [row][panel][16] of a tile, rows `stride` floats apart.
template <typename Format, int kRows, int kPanels, int kPlanes>
[[gnu::noinline]] void multiply_tile(const Weight& weight, const Prepared& x, const BlockOfTile& at, Ahead ahead,
                                     int64_t stride, float* sums) {
    const int64_t start = at.block * kActivationBlock;
    GroupOfTile group{Format::group_columns(weight, at.columns),
                      weight.panel_bytes / kLineBytes - start / Format::kStep,
                      weight.codes + at.panel * weight.panel_bytes + start / Format::kStep * kLineBytes,
                      weight.panel_bytes,
                      x.tile(at.block, at.row, at.columns),
                      nullptr,
                      &x.scale(at.block, at.row)};
    int64_t index = Format::first_group(weight, at.block);
    for (int64_t column = 0; column < at.columns; column += group.columns, ++index) {
        typename Format::Group factors[kPanels * kPieces];
#pragma GCC unroll 4
        for (int c = 0; c < kPanels * kPieces; ++c) {
            factors[c].load(weight, at.panel + c / kPieces, index, c % kPieces);
        }
        if constexpr (kPanels == kFewRowsPanels) Format::Group::prefetch(weight, at.panel + kPanels, index, kPanels);
        group.corrections = x.correction(index, at.row);
        group.lines_behind -= group.columns / Format::kStep;
        multiply_group<Format, kRows, kPanels, kPlanes>(group, factors, ahead, stride, sums);
        group.weight += group.columns / Format::kStep * kLineBytes;
        group.codes += group.columns * kRows * kPlanes;
    }
}

// The panels [panel, panel + count), kPanels of them side by side; count is a multiple of that.
template <typename Format, int kPanels, int kPlanes>
void multiply_panels(const FullyConnectedTask& task, const Weight& weight, const Prepared& x, int64_t panel,
                     int64_t count) {
    constexpr int kRows = tile_rows(kPlanes, kPanels);
    static thread_local Scratch scratch;
    const int64_t stride = count * kPanel, tiles = (task.rows + kRows - 1) / kRows;
    float* sums = scratch.get<float>(task.rows * stride);
    std::fill(sums, sums + task.rows * stride, 0.0f);
    for (int64_t block = 0; block < x.blocks; ++block) {
        const int64_t columns = block_columns(task.layout, block), lines = columns / Format::kStep;
        for (int64_t p = 0; p < count; p += kPanels) {
            const uint8_t* next = weight.codes + (panel + p) * weight.panel_bytes;
            next += block + 1 == x.blocks ? count * weight.panel_bytes
                                          : (block + 1) * kActivationBlock / Format::kStep * kLineBytes;
            for (int64_t tile = 0, row = 0; tile < tiles; ++tile, row += kRows) {
                with_rows<kRows>(task.rows - row, [&](auto rows) {
                    const Ahead ahead(next, weight.panel_bytes, lines, tile, tiles);
                    multiply_tile<Format, rows, kPanels, kPlanes>(weight, x, {block, columns, panel + p, row}, ahead,
                                                                  stride, sums + row * stride + p * kPanel);
                });
            }
        }
    }
    finish(task, panel, panel + count, {sums, stride, 2 * kPanel});
}

template <typename Format, int kPlanes>
void multiply_planes(const FullyConnectedTask& task, int64_t begin, int64_t end) {
    const Weight weight(task);
    const Prepared x(task.prepared, task.layout, task.rows, task.activation_bits);
    int64_t panel = begin;
    if (task.rows <= tile_rows(kPlanes, kFewRowsPanels)) {
        for (; panel + kFewRowsPanels <= end; panel += kFewRowsPanels) {
            multiply_panels<Format, kFewRowsPanels, kPlanes>(task, weight, x, panel, kFewRowsPanels);
        }
    }
    // Two at a time: a gate lies beside what it multiplies.
    for (; panel + 2 <= end; panel += 2) multiply_panels<Format, kManyRowsPanels, kPlanes>(task, weight, x, panel, 2);
    if (panel < end) multiply_panels<Format, 1, kPlanes>(task, weight, x, panel, 1);
}

template <typename Format>
void multiply(const FullyConnectedTask& task, int64_t begin, int64_t end) {
    if (task.activation_bits == 16) {
        multiply_planes<Format, 2>(task, begin, end);
    } else {
        multiply_planes<Format, 1>(task, begin, end);
    }
}

}  // namespace
}  // namespace chatglm
