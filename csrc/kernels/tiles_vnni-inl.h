// FullyConnected of many rows by VNNI: tiles of some rows by one or two panels, which walk over one block of K while
// its codes stay in the first-level cache.
//
// Included by kernels/fully_connected_vnni-inl.h only; everything here has internal linkage, see simd-inl.h.
#pragma once

#include "kernels/memory.h"
#include "kernels/products_vnni-inl.h"

namespace chatglm {
namespace {

// One group of columns of a tile: where its parts lie.
struct GroupOfTile {
    int64_t columns;
    const uint8_t* weight;  // of the first panel
    int64_t panel_bytes;
    const int8_t* codes;
    const int32_t* corrections;  // [row][plane]
    const float* scales;         // [row]
};

// Adds the products of one group to the sums [row][panel][16] of a tile.
template <typename Format, int kRows, int kPanels, int kPlanes>
[[gnu::always_inline]] inline void multiply_group(const GroupOfTile& group, const typename Format::Group* factors,
                                                  Ahead& ahead, int64_t stride, float* out) {
    TileSums<kRows, kPanels, kPlanes> sums;
    start_sums<typename Format::Group, kRows, kPanels, kPlanes>(factors, group.corrections, sums);
    const uint8_t* weight = group.weight;
    const int8_t* codes = group.codes;
    int64_t steps = group.columns / Format::kStep;
    do {
        Bytes lines[kPanels * kPieces];
#pragma GCC unroll 2
        for (int p = 0; p < kPanels; ++p) {
            load_line(weight + p * group.panel_bytes, lines + p * kPieces);
            prefetch_near(weight + p * group.panel_bytes);
        }
        ahead.step<kPanels>();
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
        group.corrections = x.correction(index, at.row);
        multiply_group<Format, kRows, kPanels, kPlanes>(group, factors, ahead, stride, sums);
        group.weight += group.columns / Format::kStep * kLineBytes;
        group.codes += group.columns * kRows * kPlanes;
    }
}

// The panels [panel, panel + count), kPanels of them side by side; count is a multiple of that.
template <typename Format, int kPanels, int kPlanes>
void multiply_panels(const FullyConnectedTask& task, const Weight& weight, const Prepared& x, int64_t panel,
                     int64_t count) {
    constexpr int kRows = tile_rows(kPlanes);
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
void multiply_tiles(const FullyConnectedTask& task, const Weight& weight, const Prepared& x, int64_t begin,
                    int64_t end) {
    int64_t panel = begin;
    // Two at a time: a gate lies beside what it multiplies.
    for (; panel + 2 <= end; panel += 2) multiply_panels<Format, kTilePanels, kPlanes>(task, weight, x, panel, 2);
    if (panel < end) multiply_panels<Format, 1, kPlanes>(task, weight, x, panel, 1);
}

}  // namespace
}  // namespace chatglm
