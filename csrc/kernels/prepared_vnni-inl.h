// Rows of x as the kernels that multiply bytes by VNNI want them.
//
// Included by kernels/fully_connected_vnni-inl.h only; everything here has internal linkage, see simd-inl.h.
#pragma once

#include "kernels/weight_vnni-inl.h"

namespace chatglm {
namespace {

// Accumulators of the largest tile, in lines: 24 registers of 32, or 12 of 16; and the panels that share them.
constexpr int kAccumulators = kPieces == 1 ? 24 : 6, kTilePanels = kPieces == 1 ? 2 : 1;

// Rows of a full tile.
constexpr int tile_rows(int planes) {
    return kAccumulators / kTilePanels / planes;
}

// Rows that pass together over one panel after the other: more than a tile has. Measured: so many take 2 to 24 % less
// than in tiles with int8, 4 to 19 % with int4.
template <typename Format>
constexpr int stream_rows(int planes) {
    return kPieces > 1 ? tile_rows(planes) : Format::kStreamSums / planes;
}

// What `prepare` makes of x, for R rows and B blocks; rows that pass together are one tile. Sections, each from a
// multiple of 64 bytes on:
//   codes        int8 [block][tile of rows][K / 4][row of the tile][plane][4]
//   scales       float [B][R]
//   corrections  int32 [group][R]: Format::correction of the sum of the row's codes over a group
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
        bytes = code_bytes + scale_bytes + groups * rows * 4;
        codes = static_cast<int8_t*>(const_cast<void*>(prepared));
        scales = reinterpret_cast<float*>(codes + code_bytes);
        corrections = reinterpret_cast<int32_t*>(codes + code_bytes + scale_bytes);
    }

    // Codes of the rows from `row`, the first of a tile, in a block of that many columns.
    int8_t* tile(int64_t block, int64_t row, int64_t columns) const {
        return codes + (block * kActivationBlock * rows + row * columns) * planes;
    }
    float& scale(int64_t block, int64_t row) const { return scales[block * rows + row]; }
    int32_t* correction(int64_t group, int64_t row) const { return corrections + group * rows + row; }
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

template <typename Format, int kPlanes>
void prepare_planes(const PackedLayout& layout, const Prepared& out, const float* x, int64_t x_stride, int64_t begin,
                    int64_t end) {
    const int64_t tile = out.rows <= stream_rows<Format>(kPlanes) ? out.rows : tile_rows(kPlanes);
    alignas(kLineBytes) int16_t q[kActivationBlock];
    for (int64_t row = begin; row < end; ++row) {
        const int64_t first = row / tile * tile, in_tile = std::min(tile, out.rows - first);
        for (int64_t block = 0; block < out.blocks; ++block) {
            const int64_t start = block * kActivationBlock, columns = block_columns(layout, block);
            const int64_t count = std::min(columns, layout.in_features - start);
            out.scale(block, row) = quantize_block(x + row * x_stride + start, count, columns, kPlanes * 8, q);
            pack_row<kPlanes>(q, columns, out.tile(block, first, columns) + (row - first) * kPlanes * 4,
                              in_tile * kPlanes * 4);
            const int64_t group = Format::group_columns(layout, columns);
            int64_t index = Format::first_group(layout, block);
            for (int64_t k = 0; k < columns; k += group, ++index) {
                *out.correction(index, row) = Format::correction(sum_codes(q + k, group));
            }
        }
    }
}

template <typename Format>
void prepare(const PackedLayout& layout, int64_t rows, int activation_bits, const float* x, int64_t x_stride,
             int64_t begin, int64_t end, void* prepared) {
    const Prepared out(prepared, layout, rows, activation_bits);
    if (activation_bits == 16) {
        prepare_planes<Format, 2>(layout, out, x, x_stride, begin, end);
    } else {
        prepare_planes<Format, 1>(layout, out, x, x_stride, begin, end);
    }
}

}  // namespace
}  // namespace chatglm
