// FullyConnected for weights that are multiplied as floats, AVX-512: rows of x by panels, a line of weights at a time.
//
// Included by kernels/avx512*/fully_connected*.cpp only; everything here has internal linkage, see simd-inl.h. A Format
// says how a line of 64 bytes meets x, whose rows are words of 4 bytes:
//   kParts                       products of a line: vectors of weights, and words of x that each row has for it
//   kColumns                     columns of a line
//   part(line, i)                the vector i of a line
//   add(sum, weights, word)      sum plus the products
//   add_from(sum, weights, word) the same with a word in memory, for rows that meet one line only
//   convert(x, count, columns, words)   columns of x to words, those from `count` on zero
//   kStreamRows                  rows that read one stream of weights; more pass in tiles
#pragma once

#include <algorithm>

#include "kernels/epilogue-inl.h"
#include "kernels/fully_connected-inl.h"
#include "kernels/memory.h"
#include "kernels/streams-inl.h"

namespace chatglm {
namespace {

// Of a panel: two panels of a block stay in the first-level cache while all rows pass.
constexpr int kBlockLines = 128;
// How far ahead rows of x are prefetched, which come from the third-level cache where they are many: 3 KB, measured.
constexpr int kPrefetchWords = 768;
// Rows of a tile of two panels: 24 accumulators, a register each.
constexpr int kRowsOfTile = 12;
// How far ahead of where a stream of weights is read it is prefetched into the first-level cache, measured: each line
// holds a miss buffer until it comes, and those run out from 512 bytes on.
constexpr int kNearBytes = 384;

// Further ahead the processor's own prefetcher brings the streams.
// Inlined at once: a call of a function that only prefetches is removed by GCC 12 as one without effect.
[[gnu::always_inline]] inline void prefetch_near(const uint8_t* line) {
    _mm_prefetch(line + kNearBytes, _MM_HINT_T0);
}

// Rows that pass together: all, or those of a tile, of which the last one may have fewer.
template <typename Format>
int64_t rows_together(int64_t rows) {
    return rows <= Format::kStreamRows ? rows : even_tile(rows, kRowsOfTile);
}

// Prepared: words [rows that pass together][word][row of them].
template <typename Format>
int64_t words_of_row(const PackedLayout& layout) {
    return layout.padded_in() / Format::kColumns * Format::kParts;
}

template <typename Format>
int64_t prepared_bytes(const PackedLayout& layout, int64_t rows, int) {
    return words_of_row<Format>(layout) * rows * 4;
}

template <typename Format>
void prepare(const PackedLayout& layout, int64_t rows, int, const float* x, int64_t x_stride, int64_t begin,
             int64_t end, void* prepared) {
    constexpr int64_t kColumnsAtATime = kBlockLines * Format::kColumns;
    alignas(kLineBytes) uint32_t words[kBlockLines * Format::kParts];
    const int64_t tile = rows_together<Format>(rows);
    for (int64_t row = begin; row < end; ++row) {
        const int64_t first = row / tile * tile, in_tile = std::min(tile, rows - first);
        uint32_t* out = static_cast<uint32_t*>(prepared) + first * words_of_row<Format>(layout) + row - first;
        for (int64_t start = 0; start < layout.padded_in(); start += kColumnsAtATime) {
            const int64_t columns = std::min(kColumnsAtATime, layout.padded_in() - start);
            const float* from = x + row * x_stride + start;
            Format::convert(from, std::min(columns, layout.in_features - start), columns, words);
            const int64_t count = columns / Format::kColumns * Format::kParts;
            for (int64_t i = 0; i < count; ++i, out += in_tile) *out = words[i];
        }
    }
}

// Adds the products of some lines to the sums [row][panel][16] of a tile.
template <typename Format, int kRows, int kPanels>
[[gnu::noinline]] void multiply_tile(const uint8_t* weight, int64_t panel_bytes, int64_t lines, const uint32_t* x,
                                     Ahead ahead, float* sums) {
    Floats sum[kRows][kPanels];
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int p = 0; p < kPanels; ++p) sum[r][p] = load(sums + (r * kPanels + p) * kPanel);
    }
    do {
#pragma GCC unroll 2
        for (int part = 0; part < Format::kParts; ++part) {
            Floats w[kPanels];
#pragma GCC unroll 4
            for (int p = 0; p < kPanels; ++p) {
                const uint8_t* line = weight + p * panel_bytes;
                w[p] = Format::part(line, part);
                if (part == 0) prefetch_near(line);
            }
#pragma GCC unroll 12
            for (int r = 0; r < kRows; ++r) {
                const Floats word = Floats(_mm512_set1_epi32(static_cast<int32_t>(x[part * kRows + r])));
#pragma GCC unroll 4
                for (int p = 0; p < kPanels; ++p) sum[r][p] = Format::add(sum[r][p], w[p], word);
            }
        }
#pragma GCC unroll 2
        for (int word = 0; word < Format::kParts * kRows; word += kLineBytes / 4) {
            _mm_prefetch(x + kPrefetchWords + word, _MM_HINT_T0);
        }
        ahead.step<kPanels>();
        weight += kLineBytes;
        x += Format::kParts * kRows;
    } while (--lines > 0);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int p = 0; p < kPanels; ++p) store(sums + (r * kPanels + p) * kPanel, sum[r][p]);
    }
}

template <typename Format, int kPanels>
void multiply_panels(const FullyConnectedTask& task, int64_t panel) {
    constexpr int kStride = kPanels * kPanel;
    static thread_local Scratch scratch;
    float* sums = scratch.get<float>(task.rows * kStride);
    std::fill(sums, sums + task.rows * kStride, 0.0f);
    const PackedLayout& layout = task.layout;
    const int64_t lines = layout.padded_in() / Format::kColumns, panel_bytes = layout.panel_bytes();
    const int64_t tile = rows_together<Format>(task.rows), tiles = (task.rows + tile - 1) / tile;
    for (int64_t line = 0; line < lines; line += kBlockLines) {
        const uint8_t* weight = layout.panel(task.weight, panel) + line * kLineBytes;
        const int64_t count = std::min<int64_t>(kBlockLines, lines - line);
        const uint8_t* next = line + count < lines ? weight + count * kLineBytes
                                                   : layout.panel(task.weight, panel + kPanels);
        Ahead ahead(next, panel_bytes, count, tiles);
        for (int64_t row = 0; row < task.rows; row += tile) {
            with_rows<kRowsOfTile>(std::min(tile, task.rows - row), [&](auto rows) {
                const auto* x = static_cast<const uint32_t*>(task.prepared) + row * lines * Format::kParts +
                                line * Format::kParts * rows;
                multiply_tile<Format, rows, kPanels>(weight, panel_bytes, count, x, ahead, sums + row * kStride);
            });
            ahead.next_tile();
        }
    }
    finish(task, panel, panel + kPanels, {sums, kStride, 2 * kPanel});
}

// Sums [row][16] of a panel. The parts of a line have sums of their own: a chain of additions waits for its last one in
// each line. So few rows round in another way than many, each row in the same whatever the others are.
template <typename Format, typename Reach, int kRows>
[[gnu::noinline]] void stream_panel(const uint8_t* line, int64_t lines, const uint32_t* x, float* out) {
    Floats sums[kRows][Format::kParts] = {};
    for (; lines > 0; --lines, line += kLineBytes, x += Format::kParts * kRows) {
        prefetch_stream<Reach>(line);
#pragma GCC unroll 2
        for (int part = 0; part < Format::kParts; ++part) {
            const Floats weights = Format::part(line, part);
#pragma GCC unroll 24
            for (int r = 0; r < kRows; ++r) {
                sums[r][part] = Format::add_from(sums[r][part], weights, x + part * kRows + r);
            }
        }
    }
#pragma GCC unroll 24
    for (int r = 0; r < kRows; ++r) {
        Floats sum = sums[r][0];
        for (int part = 1; part < Format::kParts; ++part) sum += sums[r][part];
        store(out + r * kStreamStride, sum);
    }
}

template <typename Format, typename Reach>
void multiply(const FullyConnectedTask& task, int64_t begin, int64_t end) {
    const PackedLayout& layout = task.layout;
    if (task.rows <= Format::kStreamRows) {
        multiply_streams<Format::kStreamRows>(task, begin, end, [&](auto rows, int64_t panel, float* sums) {
            // Two rows of bf16 read at 78 % so, and at 84 with FarReach.
            stream_panel<Format, ReachFor<Reach, rows == 1>, rows>(
                layout.panel(task.weight, panel), layout.padded_in() / Format::kColumns,
                static_cast<const uint32_t*>(task.prepared), sums);
        });
        return;
    }
    int64_t panel = begin;
    for (; panel + 2 <= end; panel += 2) multiply_panels<Format, 2>(task, panel);
    if (panel < end) multiply_panels<Format, 1>(task, panel);
}

template <typename Format>
FullyConnectedKernel kernel() {
    return {prepared_bytes<Format>, prepare<Format>,
            prefers_page_reach() ? multiply<Format, PageReach> : multiply<Format, FarReach>};
}

}  // namespace
}  // namespace chatglm
