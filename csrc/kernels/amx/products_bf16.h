// Products in bf16: rows of x rounded to bf16 in tiles, times lines of a pair of panels in bf16, summed in float32.
//
// A step of 32 columns is 4 tile loads and 4 products of 16 cycles for 32 rows and two panels. A block of 256 columns
// is 32 products, 512 cycles, with 512 line loads of operands; its sums are loaded into tiles before it and stored
// behind it, 64 lines each (288 cycles of two load ports in all). The pair's 16 KB stay in L1, the rows' 16 KB and 4 KB
// of sums come from L2: longer blocks would push the pair out of L1, shorter ones move sums more often.
#pragma once

#include "kernels/amx/weights.h"
#include "kernels/memory.h"

namespace chatglm::CHATGLM_AMX_LEVEL {
namespace {

constexpr int64_t kBf16Block = 256;
constexpr int64_t kUnitRows = 2 * kTileSide;
constexpr int64_t kStepColumns = 32;

// Layout of `prepared`: [block][unit of 32 rows][2 tiles of rows][columns / 32][16 rows][32 columns] bfloat16.
struct Bf16Rows {
    Blocks blocks;
    int64_t padded_rows;

    Bf16Rows(const PackedLayout& layout, int64_t rows)
        : blocks{layout.padded_in(), kBf16Block}, padded_rows(round_up(rows, kUnitRows)) {}

    int64_t bytes() const { return padded_rows * blocks.padded_in * 2; }
    int64_t tile_row_bytes(int64_t block) const { return kTileSide * blocks.columns_of(block) * 2; }
    int64_t unit_at(int64_t block, int64_t unit) const {
        return block * kBf16Block * padded_rows * 2 + unit * 2 * tile_row_bytes(block);
    }
};

inline int64_t prepared_bytes_bf16(const PackedLayout& layout, int64_t rows, int) {
    return Bf16Rows(layout, rows).bytes();
}

inline void prepare_row_bf16(const Bf16Rows& rows, const float* x, int64_t count, int64_t row, uint8_t* prepared) {
    for (int64_t column = 0; column < rows.blocks.padded_in; column += kLanes) {
        const int64_t block = column / kBf16Block, inside = column % kBf16Block;
        uint8_t* out = prepared + rows.unit_at(block, row / kUnitRows) +
                       row % kUnitRows / kTileSide * rows.tile_row_bytes(block) + inside / kStepColumns * kTileBytes +
                       row % kTileSide * 64 + inside % kStepColumns * 2;
        const __m256bh rounded = _mm512_cvtneps_pbh(__m512(load_before(x, column, count)));
        std::memcpy(out, &rounded, sizeof rounded);
    }
}

inline void prepare_bf16(const PackedLayout& layout, int64_t rows, int, const float* x, int64_t x_stride, int64_t begin,
                         int64_t end, void* prepared) {
    const Bf16Rows tiles(layout, rows);
    const int64_t padded_end = end == rows ? tiles.padded_rows : end;
    for (int64_t row = begin; row < padded_end; ++row) {
        prepare_row_bf16(tiles, x + std::min(row, rows - 1) * x_stride, row < rows ? layout.in_features : 0, row,
                         static_cast<uint8_t*>(prepared));
    }
}

// y [32 rows][32 features] += or, at the first block, = the product of a unit with a pair of panels; `between` runs in
// each step.
template <typename Between>
inline void multiply_unit_bf16(const uint8_t* unit, int64_t tile_row_bytes, const PairLines& lines, bool is_first,
                               const Between& between, float* y) {
    constexpr int64_t kStride = kPairFeatures * sizeof(float);
    float* lower = y + kTileSide * kPairFeatures;
    if (is_first) {
        zero_sums();
    } else {
        load_tile<0>(y, kStride);
        load_tile<1>(y + kPanel, kStride);
        load_tile<2>(lower, kStride);
        load_tile<3>(lower + kPanel, kStride);
    }
    for (int64_t at = 0; at < tile_row_bytes; at += kTileBytes) {
        load_tile<6>(lines.panel[0] + at, 64);
        load_tile<4>(unit + at, 64);
        dot_bf16<0, 4, 6>();
        load_tile<7>(lines.panel[1] + at, 64);
        dot_bf16<1, 4, 7>();
        load_tile<5>(unit + tile_row_bytes + at, 64);
        dot_bf16<2, 5, 6>();
        dot_bf16<3, 5, 7>();
        between();
    }
    store_tile<0>(y, kStride);
    store_tile<1>(y + kPanel, kStride);
    store_tile<2>(lower, kStride);
    store_tile<3>(lower + kPanel, kStride);
}

// Adds one block of columns of all rows times a pair of panels to y [padded rows][32], and brings the next pair.
template <typename Weights>
void multiply_pair_block_bf16(const Bf16Rows& rows, const uint8_t* prepared, int64_t block, Weights& weights,
                              const PairBlock& next, float* y) {
    const int64_t units = rows.padded_rows / kUnitRows, tile_row_bytes = rows.tile_row_bytes(block);
    const PairLines lines = weights.take();
    weights.start(next, units * (tile_row_bytes / kTileBytes));
    for (int64_t unit = 0; unit < units; ++unit, y += kUnitRows * kPairFeatures) {
        multiply_unit_bf16(prepared + rows.unit_at(block, unit), tile_row_bytes, lines, block == 0,
                           [&] { weights.step(); }, y);
    }
}

template <typename Weights>
void multiply_bf16(const FullyConnectedTask& task, int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    const Bf16Rows rows(task.layout, task.rows);
    const int64_t group_pairs = pairs_of_group(rows.bytes()), pair_floats = rows.padded_rows * kPairFeatures;
    const uint8_t* prepared = static_cast<const uint8_t*>(task.prepared);
    float* sums = scratch.get<float>(group_pairs * pair_floats);
    Weights weights(task, rows.blocks);
    weights.start(pair_before(end, begin, 0), 1);
    const TileScope tiles(kTileSide, 64);
    const auto multiply = [&](const PairBlock& pair, int64_t first, const PairBlock& next) {
        float* y = sums + (pair.panel - first) / 2 * pair_floats;
        multiply_pair_block_bf16(rows, prepared, pair.block, weights, next, y);
    };
    const auto finish_group = [&](int64_t first, int64_t last) {
        finish(task, first, last, {sums, kPairFeatures, pair_floats});
    };
    walk(begin, end, rows.blocks.count(), group_pairs, multiply, finish_group);
}

}  // namespace
}  // namespace chatglm::CHATGLM_AMX_LEVEL
