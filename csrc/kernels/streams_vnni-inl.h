// A panel of few rows by VNNI.
//
// Included by kernels/fully_connected_vnni-inl.h only; everything here has internal linkage, see simd-inl.h.
#pragma once

#include "kernels/products_vnni-inl.h"
#include "kernels/streams-inl.h"

namespace chatglm {
namespace {

// Registers for sums of both nibbles of a line apart: where there are enough, so that no chain of additions waits for
// itself within a line.
constexpr int kApartRegisters = kPieces == 1 ? kAccumulators : 8;

// Adds the products of one group to the sums [row][16] of a panel; returns the line behind it.
template <typename Format, typename Reach, int kRows, int kPlanes>
[[gnu::always_inline]] inline const uint8_t* stream_group(const uint8_t* line, int64_t columns, const int8_t* codes,
                                                          const int32_t* corrections,
                                                          const typename Format::Group* factors, const float* scales,
                                                          float* out) {
    constexpr int kParts = Format::kStep / 4;
    constexpr bool kApart = kParts == 2 && 2 * kRows * kPlanes * kPieces <= kApartRegisters;
    TileSums<kRows, 1, kPlanes> sums[kApart ? 2 : 1] = {};
    start_sums<typename Format::Group, kRows, 1, kPlanes>(factors, corrections, sums[0]);
    for (int64_t steps = columns / Format::kStep; steps > 0; --steps) {
        Bytes pieces[kPieces];
        load_line(line, pieces);
        prefetch_stream<Reach>(line);
#pragma GCC unroll 2
        for (int part = 0; part < kParts; ++part) {
            add_line<Format, kRows, 1, kPlanes>(sums[kApart ? part : 0], pieces, codes, part);
        }
        line += kLineBytes;
        codes += Format::kStep * kRows * kPlanes;
    }
    if constexpr (kApart) add_sums<kRows, 1, kPlanes>(sums[1], sums[0]);
    add_scaled<typename Format::Group, kRows, 1, kPlanes>(sums[0], factors, scales, kStreamStride, out);
    return line;
}

// Sums [row][16] of a panel.
template <typename Format, typename Reach, int kRows, int kPlanes>
[[gnu::noinline]] void stream_panel(const PackedLayout& layout, const Weight& weight, const Prepared& x, int64_t panel,
                                    float* out) {
    const uint8_t* line = weight.codes + panel * weight.panel_bytes;
    for (int r = 0; r < kRows; ++r) std::fill_n(out + r * kStreamStride, kPanel, 0.0f);
    for (int64_t block = 0; block < x.blocks; ++block) {
        const int64_t columns = block_columns(layout, block), group = Format::group_columns(layout, columns);
        const int8_t* codes = x.tile(block, 0, columns);
        int64_t index = Format::first_group(layout, block);
        for (int64_t column = 0; column < columns; column += group, ++index) {
            typename Format::Group factors[kPieces];
            for (int i = 0; i < kPieces; ++i) factors[i].load(weight, panel, index, i);
            Format::Group::prefetch(layout, weight, panel, index, Reach::kBytes);
            line = stream_group<Format, Reach, kRows, kPlanes>(line, group, codes + column * kRows * kPlanes,
                                                               x.correction(index, 0), factors, &x.scale(block, 0),
                                                               out);
        }
    }
}

}  // namespace
}  // namespace chatglm
