// FullyConnected of many rows by VNNI: tiles of some rows by one or two panels, which walk over one block of K while
// its codes stay in the first-level cache.
//
// Included by kernels/fully_connected_vnni-inl.h only; everything here has internal linkage, see simd-inl.h.
#pragma once

#include "kernels/epilogue-inl.h"
#include "kernels/memory.h"
#include "kernels/products_vnni-inl.h"

namespace chatglm {
namespace {

template <typename Format>
inline const uint8_t* block_codes(const Weight& weight, int64_t panel, int64_t block) {
    return weight.codes + panel * weight.panel_bytes + block * kActivationBlock / Format::kStep * kLineBytes;
}

// Sums [row][panel][16] of a pair of panels, which a tile has one after the other.
constexpr int64_t kPairFloats = 2 * kPanel;

// A block of K of one or two panels, which all tiles pass over.
struct BlockOfPanels {
    const Weight& weight;
    int64_t panel, group, columns, group_columns;
    const uint8_t* codes;  // of the first panel
};

// What a tile of rows has in a block.
struct TileOfRows {
    const int8_t* codes;
    const int32_t* corrections;  // of the first group
    int64_t rows;                // of x, between the corrections of two groups
    const float* scales;
    float* sums;
    Ahead ahead;
};

// Adds the products of one group to the sums of a tile.
template <typename Format, int kRows, int kPanels, int kPlanes>
[[gnu::always_inline]] inline void multiply_group(const uint8_t* weight, int64_t panel_bytes, int64_t columns,
                                                  const typename Format::Group* factors, TileOfRows& tile) {
    TileSums<kRows, kPanels, kPlanes> sums;
    start_sums<typename Format::Group, kRows, kPanels, kPlanes>(factors, tile.corrections, sums);
    int64_t steps = columns / Format::kStep;
    do {
        Bytes lines[kPanels * kPieces];
#pragma GCC unroll 2
        for (int p = 0; p < kPanels; ++p) load_line(weight + p * panel_bytes, lines + p * kPieces);
        tile.ahead.step<kPanels>();
#pragma GCC unroll 2
        for (int part = 0; part < Format::kStep / 4; ++part) {
            add_line<Format, kRows, kPanels, kPlanes>(sums, lines, tile.codes, part);
        }
        weight += kLineBytes;
        tile.codes += Format::kStep * kRows * kPlanes;
    } while (--steps > 0);
    add_scaled<typename Format::Group, kRows, kPanels, kPlanes>(sums, factors, tile.scales, kPairFloats, tile.sums);
}

// Adds the products of one block to the sums of a tile.
template <typename Format, int kRows, int kPanels, int kPlanes>
[[gnu::noinline]] void multiply_tile(const BlockOfPanels& block, TileOfRows tile) {
    const uint8_t* weight = block.codes;
    for (int64_t column = 0, group = block.group; column < block.columns; column += block.group_columns, ++group) {
        typename Format::Group factors[kPanels * kPieces];
#pragma GCC unroll 4
        for (int c = 0; c < kPanels * kPieces; ++c) {
            factors[c].load(block.weight, block.panel + c / kPieces, group, c % kPieces);
        }
        multiply_group<Format, kRows, kPanels, kPlanes>(weight, block.weight.panel_bytes, block.group_columns, factors,
                                                        tile);
        weight += block.group_columns / Format::kStep * kLineBytes;
        tile.corrections += tile.rows;
    }
}

// Panels whose blocks pass one after the other, and which are finished together: the codes of x of a block stay in the
// first-level cache meanwhile, those of many rows in the second-level one.
constexpr int64_t kPanelsTogether = 8;
static_assert(kPanelsTogether % 2 == 0, "a gate lies beside what it multiplies");

template <int kRows, int kPanels>
inline void clear_sums(float* sums) {
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int i = 0; i < kPanels * kPanel; i += kLanes) store(sums + r * kPairFloats + i, Floats{});
    }
}

// Adds the products of a block of kPanels panels with all rows to their sums, which begin with the first block.
template <typename Format, int kPanels, int kPlanes>
void multiply_block(const FullyConnectedTask& task, const Weight& weight, const Prepared& x, int64_t block,
                    int64_t panel, const Ahead& ahead, float* sums) {
    constexpr int kRows = tile_rows(kPlanes);
    const int64_t columns = block_columns(task.layout, block), group = Format::first_group(task.layout, block);
    const BlockOfPanels panels{weight, panel, group, columns, Format::group_columns(task.layout, columns),
                               block_codes<Format>(weight, panel, block)};
    TileOfRows tile{x.tile(block, 0, columns), x.correction(group, 0), task.rows, &x.scale(block, 0), sums, ahead};
    for (int64_t row = 0; row < task.rows; row += kRows) {
        with_rows<kRows>(task.rows - row, [&](auto rows) {
            if (block == 0) clear_sums<rows, kPanels>(tile.sums);
            multiply_tile<Format, rows, kPanels, kPlanes>(panels, tile);
        });
        tile.codes += columns * kRows * kPlanes;
        tile.corrections += kRows;
        tile.scales += kRows;
        tile.sums += kRows * kPairFloats;
        tile.ahead.next_tile();
    }
}

// The panels [first, last).
template <typename Format, int kPlanes>
void multiply_together(const FullyConnectedTask& task, const Weight& weight, const Prepared& x, int64_t first,
                       int64_t last) {
    constexpr int kRows = tile_rows(kPlanes);
    static thread_local Scratch scratch;
    const int64_t tiles = (task.rows + kRows - 1) / kRows, pair_stride = task.rows * kPairFloats;
    float* sums = scratch.get<float>((last - first + 1) / 2 * pair_stride);
    for (int64_t block = 0; block < x.blocks; ++block) {
        const uint8_t* next_block = block + 1 < x.blocks ? block_codes<Format>(weight, first, block + 1)
                                                         : block_codes<Format>(weight, last, 0);
        const int64_t lines = block_columns(task.layout, block) / Format::kStep;
        for (int64_t panel = first; panel < last; panel += kTilePanels) {
            const uint8_t* next = panel + kTilePanels < last ? block_codes<Format>(weight, panel + kTilePanels, block)
                                                                   : next_block;
            const Ahead ahead(next, weight.panel_bytes, lines, tiles);
            float* of_panel = sums + (panel - first) / 2 * pair_stride + (panel - first) % 2 * kPanel;
            if (panel + kTilePanels <= last) {
                multiply_block<Format, kTilePanels, kPlanes>(task, weight, x, block, panel, ahead, of_panel);
            } else {
                multiply_block<Format, 1, kPlanes>(task, weight, x, block, panel, ahead, of_panel);
            }
        }
    }
    finish(task, first, last, {sums, kPairFloats, pair_stride});
}

template <typename Format, int kPlanes>
void multiply_tiles(const FullyConnectedTask& task, const Weight& weight, const Prepared& x, int64_t begin,
                    int64_t end) {
    for (int64_t first = begin; first < end; first += kPanelsTogether) {
        multiply_together<Format, kPlanes>(task, weight, x, first, std::min(first + kPanelsTogether, end));
    }
}

}  // namespace
}  // namespace chatglm
