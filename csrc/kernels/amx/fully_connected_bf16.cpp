// bf16 weights: rows of x rounded to bf16 in tiles, times the packed lines as they are, summed in float32.
//
// A step of 32 columns is 4 tile loads and 4 products of 16 cycles for 32 rows and two panels. A block of 256 columns
// is 32 products, 512 cycles, with 512 line loads of operands; its sums are loaded into tiles before it and stored
// behind it, 64 lines each (288 cycles of two load ports in all). No vector code runs beside. The pair's 16 KB stay in
// L1, the rows' 16 KB and 4 KB of sums come from L2: longer blocks would push the pair out of L1, shorter ones move
// sums more often.
#include "kernels/amx/blocking.h"
#include "kernels/amx/fully_connected.h"
#include "kernels/epilogue-inl.h"
#include "kernels/fully_connected-inl.h"
#include "kernels/memory.h"

namespace chatglm::CHATGLM_AMX_LEVEL {
namespace {

constexpr int64_t kBlock = 256;
constexpr int64_t kUnitRows = 2 * kTileSide;
constexpr int64_t kStepColumns = 32;
constexpr int64_t kTileBytes = kTileSide * 64;

// Layout of `prepared`: [block][unit of 32 rows][2 tiles of rows][columns / 32][16 rows][32 columns] bfloat16.
struct Bf16Rows {
    int64_t columns, padded_rows;

    Bf16Rows(const PackedLayout& layout, int64_t rows)
        : columns(layout.padded_in()), padded_rows(round_up(rows, kUnitRows)) {}

    int64_t blocks() const { return (columns + kBlock - 1) / kBlock; }
    int64_t block_columns(int64_t block) const { return std::min(kBlock, columns - block * kBlock); }
    int64_t bytes() const { return padded_rows * columns * 2; }
    int64_t tile_row_bytes(int64_t block) const { return kTileSide * block_columns(block) * 2; }
    int64_t unit_at(int64_t block, int64_t unit) const {
        return block * kBlock * padded_rows * 2 + unit * 2 * tile_row_bytes(block);
    }
};

int64_t prepared_bytes(const PackedLayout& layout, int64_t rows, int) {
    return Bf16Rows(layout, rows).bytes();
}

void prepare_row(const Bf16Rows& rows, const float* x, int64_t count, int64_t row, uint8_t* prepared) {
    for (int64_t column = 0; column < rows.columns; column += kLanes) {
        const int64_t block = column / kBlock, inside = column % kBlock;
        uint8_t* out = prepared + rows.unit_at(block, row / kUnitRows) +
                       row % kUnitRows / kTileSide * rows.tile_row_bytes(block) + inside / kStepColumns * kTileBytes +
                       row % kTileSide * 64 + inside % kStepColumns * 2;
        const __m256bh rounded = _mm512_cvtneps_pbh(__m512(load_before(x, column, count)));
        std::memcpy(out, &rounded, sizeof rounded);
    }
}

void prepare(const PackedLayout& layout, int64_t rows, int, const float* x, int64_t x_stride, int64_t begin,
             int64_t end, void* prepared) {
    const Bf16Rows tiles(layout, rows);
    const int64_t padded_end = end == rows ? tiles.padded_rows : end;
    for (int64_t row = begin; row < padded_end; ++row) {
        prepare_row(tiles, x + std::min(row, rows - 1) * x_stride, row < rows ? layout.in_features : 0, row,
                    static_cast<uint8_t*>(prepared));
    }
}

// y [32 rows][32 features] += or, at the first block, = the product of a unit with two panels.
void multiply_unit(const uint8_t* unit, int64_t tile_row_bytes, const uint8_t* const panel[2], int64_t columns,
                   bool is_first, Prefetch& prefetch, float* y) {
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
    for (int64_t k = 0; k < columns; k += kStepColumns) {
        const int64_t at = k / kStepColumns * kTileBytes;
        load_tile<6>(panel[0] + at, 64);
        load_tile<4>(unit + at, 64);
        dot_bf16<0, 4, 6>();
        load_tile<7>(panel[1] + at, 64);
        dot_bf16<1, 4, 7>();
        load_tile<5>(unit + tile_row_bytes + at, 64);
        dot_bf16<2, 5, 6>();
        dot_bf16<3, 5, 7>();
        prefetch.step();
    }
    store_tile<0>(y, kStride);
    store_tile<1>(y + kPanel, kStride);
    store_tile<2>(lower, kStride);
    store_tile<3>(lower + kPanel, kStride);
}

const uint8_t* lines(const FullyConnectedTask& task, int64_t panel, int64_t block) {
    return task.layout.panel(task.weight, panel) + block * kBlock * kPanel * 2;
}

void multiply_pair_block(const FullyConnectedTask& task, const Bf16Rows& rows, const PairBlock& pair,
                         const PairBlock& next, float* y) {
    const int64_t units = rows.padded_rows / kUnitRows, columns = rows.block_columns(pair.block);
    const uint8_t* prepared = static_cast<const uint8_t*>(task.prepared);
    const uint8_t* const panel[2] = {lines(task, pair.panel, pair.block),
                                     lines(task, pair.panel + pair.panels - 1, pair.block)};
    Prefetch prefetch(nullptr, nullptr, 0, 1);
    if (next.panels > 0) {
        prefetch = Prefetch(lines(task, next.panel, next.block), lines(task, next.panel + next.panels - 1, next.block),
                            rows.block_columns(next.block) * kPanel * 2, units * columns / kStepColumns);
    }
    for (int64_t unit = 0; unit < units; ++unit, y += kUnitRows * kPairFeatures) {
        multiply_unit(prepared + rows.unit_at(pair.block, unit), rows.tile_row_bytes(pair.block), panel, columns,
                      pair.block == 0, prefetch, y);
    }
}

void multiply(const FullyConnectedTask& task, int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    const Bf16Rows rows(task.layout, task.rows);
    const int64_t group_pairs = pairs_of_group(rows.bytes()), pair_floats = rows.padded_rows * kPairFeatures;
    float* sums = scratch.get<float>(group_pairs * pair_floats);
    const TileScope tiles(kTileSide, 64);
    const auto multiply_pair = [&](const PairBlock& pair, int64_t first, const PairBlock& next) {
        multiply_pair_block(task, rows, pair, next, sums + (pair.panel - first) / 2 * pair_floats);
    };
    const auto finish = [&](int64_t first, int64_t last) { finish_group(task, first, last, sums, pair_floats); };
    walk(begin, end, rows.blocks(), group_pairs, multiply_pair, finish);
}

}  // namespace

FullyConnectedKernel fully_connected_bf16() {
    return {prepared_bytes, prepare, multiply};
}

}  // namespace chatglm::CHATGLM_AMX_LEVEL
