// Products of a line of codes with rows of x, and their sums: the steps of tiles_vnni-inl.h and streams_vnni-inl.h.
//
// Included by kernels/fully_connected_vnni-inl.h only; everything here has internal linkage, see simd-inl.h.
#pragma once

#include "kernels/epilogue-inl.h"
#include "kernels/prepared_vnni-inl.h"
#include "kernels/weight_vnni-inl.h"

namespace chatglm {
namespace {

// Of some rows by some panels side by side, typed as the instruction has them: GCC 12 copies those of another type at
// each step.
template <int kRows, int kPanels, int kPlanes>
using TileSums = Ints[kRows][kPlanes][kPanels * kPieces];

// What the sums of a group start from: those of the low plane, or the only one, from the correction of both.
template <typename Group, int kRows, int kPanels, int kPlanes>
[[gnu::always_inline]] inline void start_sums(const Group* factors, const int32_t* corrections,
                                              TileSums<kRows, kPanels, kPlanes>& sums) {
#pragma GCC unroll 24
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int l = 0; l < kPlanes; ++l) {
#pragma GCC unroll 4
            for (int c = 0; c < kPanels * kPieces; ++c) {
                sums[r][l][c] = l == kPlanes - 1 ? factors[c].start(corrections[r]) : Ints{};
            }
        }
    }
}

// Adds sums over other columns of the same group.
template <int kRows, int kPanels, int kPlanes>
[[gnu::always_inline]] inline void add_sums(const TileSums<kRows, kPanels, kPlanes>& sums,
                                            TileSums<kRows, kPanels, kPlanes>& into) {
#pragma GCC unroll 24
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int l = 0; l < kPlanes; ++l) {
#pragma GCC unroll 4
            for (int c = 0; c < kPanels * kPieces; ++c) into[r][l][c] += sums[r][l][c];
        }
    }
}

// A line of codes. Loaded once, whatever is taken out of it: the compiler would load it again for the other nibbles.
[[gnu::always_inline]] inline void load_line(const uint8_t* line, Bytes* pieces) {
#pragma GCC unroll 2
    for (int i = 0; i < kPieces; ++i) {
        pieces[i] = load_bytes(line + i * kPieceBytes);
        asm volatile("" : "+v"(pieces[i]));
    }
}

inline Bytes broadcast_bytes(const int8_t* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return broadcast_word(four);
}

// Adds the products of one line of codes of each panel, column group `part` of it.
template <typename Format, int kRows, int kPanels, int kPlanes>
[[gnu::always_inline]] inline void add_line(TileSums<kRows, kPanels, kPlanes>& sums,
                                            const Bytes (&lines)[kPanels * kPieces], const int8_t* codes, int part) {
    constexpr int kColumns = kPanels * kPieces;
    Bytes w[kColumns];
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) w[c] = Format::codes(lines[c], part);
#pragma GCC unroll 24
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int l = 0; l < kPlanes; ++l) {
            const int8_t* four = codes + ((part * kRows + r) * kPlanes + l) * 4;
            if constexpr (kColumns == 1) {
                sums[r][l][0] = add_products_from(sums[r][l][0], w[0], four);
            } else {
                const Bytes x = broadcast_bytes(four);
#pragma GCC unroll 4
                for (int c = 0; c < kColumns; ++c) sums[r][l][c] = add_products(sums[r][l][c], w[c], x);
            }
        }
    }
}

// Adds the scaled sums of a group to those of the tile, out [row][panel][16], rows `stride` floats apart.
template <typename Group, int kRows, int kPanels, int kPlanes>
[[gnu::always_inline]] inline void add_scaled(const TileSums<kRows, kPanels, kPlanes>& sums, const Group* factors,
                                              const float* activation_scales, int64_t stride, float* out) {
    // Hides that `out` is the same for each group: GCC 12 would keep all sums on the stack instead.
    asm volatile("" : "+r"(out));
#pragma GCC unroll 24
    for (int r = 0; r < kRows; ++r, out += stride) {
#pragma GCC unroll 4
        for (int c = 0; c < kPanels * kPieces; ++c) {
            Ints total = sums[r][kPlanes - 1][c];
            if constexpr (kPlanes == 2) total = sum_planes(sums[r][0][c], total);
            float* at = out + c * kLanes;
            const Floats factor = factors[c].scale(activation_scales[r]);
            store(at, multiply_add(__builtin_convertvector(total, Floats), factor, load(at)));
        }
    }
}

}  // namespace
}  // namespace chatglm
