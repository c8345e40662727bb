// What the FullyConnected kernels of every level do alike: rows of x to integers, and the choice of a tile by its rows.
//
// Included by kernels/<level>/fully_connected*.cpp only; everything here has internal linkage, see simd-inl.h.
#pragma once

#include <algorithm>
#include <cfloat>
#include <type_traits>

#include "kernels/simd-inl.h"
#include "kernels/table.h"

namespace chatglm {
namespace {

constexpr int kLineBytes = 64;

inline int64_t activation_blocks(const PackedLayout& layout) {
    return (layout.padded_in() + kActivationBlock - 1) / kActivationBlock;
}

// Columns of a block with the padding of the weight, a multiple of 64.
inline int64_t block_columns(const PackedLayout& layout, int64_t block) {
    return std::min(kActivationBlock, layout.padded_in() - block * kActivationBlock);
}

// Part of a row of x that ends with `count` columns; zero behind them.
inline Floats load_before(const float* x, int64_t column, int64_t count) {
    if (column + kLanes <= count) return load(x + column);
    return column < count ? load_part(x + column, count - column) : Floats{};
}

// Bits of the largest |x| of a block: NaN is larger than infinity, infinity larger than any number.
inline int32_t largest_bits(const float* x, int64_t count) {
    Ints largest{};
    for (int64_t i = 0; i < count; i += kLanes) {
        _mm_prefetch(x + i + kActivationBlock, _MM_HINT_T0);
        const Ints bits = bits_of(absolute(load_before(x, i, count)));
        largest = bits > largest ? bits : largest;
    }
    int32_t result = 0;
    for (int i = 0; i < kLanes; ++i) result = std::max(result, largest[i]);
    return result;
}

// The largest 16-bit code of x: its planes of 8 bits, high and low, are signed both.
constexpr int32_t kLargestCode = 127 * 256 + 127;
static_assert(kActivationBlock * 128 * kLargestCode <= INT32_MAX, "sums of both planes fit 32 bits");

// Sums of 16-bit codes from those of their planes. Either may have wrapped, or lack what the other has too much:
// modulo 2^32 the result is right, and it fits.
inline Ints sum_planes(Ints high, Ints low) {
    return Ints((Bits(high) << 8) + Bits(low));
}

// Quantizes `count` columns of a row (one block, table.h) and returns their scale; q [columns] is 0 from `count` on.
// The scale is a normal number: a quotient of subnormal ones could leave the range of q.
// A block with a value that is not finite has the scale NaN and q = 0, so that the outputs of its row become NaN.
inline float quantize_block(const float* x, int64_t count, int64_t columns, int activation_bits, int16_t* q) {
    const int32_t bits = largest_bits(x, count);
    if (bits >= 0x7f800000) {
        std::fill(q, q + columns, int16_t{0});
        return std::numeric_limits<float>::quiet_NaN();
    }
    float largest;
    std::memcpy(&largest, &bits, 4);
    const float codes = activation_bits == 16 ? kLargestCode : 127;
    const float scale = std::max(largest / codes, FLT_MIN);
    // A division a vector would take most of the time: times 1 / s the largest |x| comes out at most 2^-7 above the
    // limit, and is rounded to it.
    const float inverse = 1.0f / scale, shift = kRoundingShift;
    for (int64_t i = 0; i < columns; i += kLanes) {
        const Ints whole = bits_of(load_before(x, i, count) * inverse + shift) - bits_of(broadcast(shift));
        const Shorts narrow = __builtin_convertvector(whole, Shorts);
        std::memcpy(q + i, &narrow, sizeof narrow);
    }
    return scale;
}

// Sum of `count` codes that quantize_block has stored, a multiple of 16 of them.
inline int32_t sum_codes(const int16_t* q, int64_t count) {
    Ints sums{};
    for (int64_t i = 0; i < count; i += kLanes) {
        Shorts codes;
        std::memcpy(&codes, q + i, sizeof codes);
        sums += __builtin_convertvector(codes, Ints);
    }
    int32_t result = 0;
    for (int i = 0; i < kLanes; ++i) result += sums[i];
    return result;
}

#if defined(__AVX512F__)
// 32 numbers that quantize_block has just stored. In two halves, as it stores them: a load of more than one store must
// wait until they have reached the cache.
inline __m512i load_words(const int16_t* q) {
    constexpr __mmask8 kAllQuads = 0xff;  // the plain instruction; GCC 12 warns of its own header's form without one
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + 16));
    return _mm512_maskz_inserti64x4(kAllQuads, _mm512_castsi256_si512(low), high, 1);
}
#endif

// Lines of the block that is next, brought into the first-level cache while all tiles of rows pass over this one, each
// its part of them: so what the memory needs for a block is hidden behind the products of all rows, not of the first
// tile's.
class Ahead {
public:
    // next: of the first panel; the others lie panel_bytes apart. lines: of a panel in a block, and steps of a tile.
    Ahead(const uint8_t* next, int64_t panel_bytes, int64_t lines, int64_t tiles)
        : at_(next),
          panel_bytes_(panel_bytes),
          step_((kLineBytes + tiles - 1) / tiles),
          tile_(lines * kLineBytes / tiles) {}

    // To the part of the tile that follows the one which has this object, not to that of a copy.
    void next_tile() { at_ += tile_; }

    // A line is asked for by several steps: that costs less than to count them.
    template <int kPanels>
    [[gnu::always_inline]] void step() {
#pragma GCC unroll 4
        for (int p = 0; p < kPanels; ++p) _mm_prefetch(at_ + p * panel_bytes_, _MM_HINT_T0);
        at_ += step_;
    }

private:
    const uint8_t* at_;
    int64_t panel_bytes_, step_, tile_;
};

// Rows of a tile, where tiles of at most `most` rows have as many as each other: a small one would wait for its own sums.
inline int64_t even_tile(int64_t rows, int64_t most) {
    const int64_t tiles = (rows + most - 1) / most;
    return (rows + tiles - 1) / tiles;
}

// Calls tile(std::integral_constant<int, rows>()), with rows in 1..kMost.
template <int kMost, typename Tile>
inline void with_rows(int64_t rows, const Tile& tile) {
    if constexpr (kMost > 1) {
        if (rows < kMost) return with_rows<kMost - 1>(rows, tile);
    }
    tile(std::integral_constant<int, kMost>());
}

}  // namespace
}  // namespace chatglm
