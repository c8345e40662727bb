// What the int8 and int4 kernels share: rows of x as tiles of planes, and the product of a pair of panels with them.
//
// Two A tiles, called streams, meet the two panels of a pair: with 16 bits the high and the low plane of 16 rows, with
// 8 bits two times 16 rows. So a unit of rows is 16 or 32 rows, and each of its steps loads 4 tiles for 4 products.
// Integer sums become floats in vector code that runs between the tile products of the next sums (two buffers).
#pragma once

#include "kernels/amx/blocking.h"
#include "kernels/epilogue-inl.h"
#include "kernels/fully_connected-inl.h"
#include "kernels/memory.h"

namespace chatglm::CHATGLM_AMX_LEVEL {
namespace {

constexpr int64_t kTileBytes = kTileSide * 64;

// Layout of `prepared`:
//   tiles   [block][unit][stream][columns / 64][16 rows][64 columns] int8
//   scales  [block][padded rows] float32
//   offsets [block][plane][padded rows] int32: 128 times the sum of a plane over the block
class QuantizedRows {
public:
    QuantizedRows(const PackedLayout& layout, int64_t rows, int activation_bits)
        : columns_(layout.padded_in()),
          blocks_(activation_blocks(layout)),
          planes_(activation_bits == 16 ? 2 : 1),
          unit_rows_(2 * kTileSide / planes_),
          padded_rows_(round_up(rows, unit_rows_)) {}

    int64_t blocks() const { return blocks_; }
    int64_t planes() const { return planes_; }
    int64_t unit_rows() const { return unit_rows_; }
    int64_t padded_rows() const { return padded_rows_; }
    int64_t units() const { return padded_rows_ / unit_rows_; }
    int64_t columns(int64_t block) const { return std::min(kActivationBlock, columns_ - block * kActivationBlock); }
    int64_t tile_bytes() const { return padded_rows_ * columns_ * planes_; }
    int64_t bytes() const { return tile_bytes() + blocks_ * padded_rows_ * 4 * (1 + planes_); }

    // Tiles of the first unit; both streams of a unit lie one after the other, and the next unit behind them.
    int64_t units_at(int64_t block) const { return block * kActivationBlock * padded_rows_ * planes_; }
    int64_t stream_bytes(int64_t block) const { return kTileSide * columns(block); }

    // First byte of a row in a plane; its next 64 columns are a tile further.
    int64_t row_at(int64_t block, int64_t row, int64_t plane) const {
        const int64_t stream = planes_ == 2 ? plane : row % unit_rows_ / kTileSide;
        const int64_t streams = row / unit_rows_ * 2 + stream;
        return units_at(block) + streams * stream_bytes(block) + row % kTileSide * 64;
    }
    int64_t scale_at(int64_t block, int64_t row) const { return tile_bytes() + (block * padded_rows_ + row) * 4; }
    int64_t offset_at(int64_t block, int64_t plane, int64_t row) const {
        return tile_bytes() + ((blocks_ + block * planes_ + plane) * padded_rows_ + row) * 4;
    }

private:
    int64_t columns_, blocks_, planes_, unit_rows_, padded_rows_;
};

// Low bytes of 64 numbers of 16 bits, in their order.
inline __m512i low_bytes(__m512i first, __m512i second) {
    // Under these masks they are the plain instructions; GCC 12 warns of its own header's forms without them.
    constexpr __mmask32 kAllBytes = 0xffffffff;
    constexpr __mmask8 kAllWords = 0xff;
    return _mm512_maskz_inserti64x4(kAllWords,
                                    _mm512_castsi256_si512(_mm512_maskz_cvtepi16_epi8(kAllBytes, first)),
                                    _mm512_maskz_cvtepi16_epi8(kAllBytes, second), 1);
}

// Writes a row of one plane of a block to its tiles and returns its sum. q = 256 high + low, low in -128..127.
template <bool kHigh>
inline int32_t write_plane(const int16_t* q, int64_t columns, uint8_t* out) {
    __m512i sums = _mm512_setzero_si512();
    for (int64_t i = 0; i < columns; i += 64, out += kTileBytes) {
        __m512i first = _mm512_loadu_si512(q + i), second = _mm512_loadu_si512(q + i + 32);
        if constexpr (kHigh) {
            const __m512i half = _mm512_set1_epi16(128);
            first = _mm512_srai_epi16(_mm512_add_epi16(first, half), 8);
            second = _mm512_srai_epi16(_mm512_add_epi16(second, half), 8);
        }
        const __m512i bytes = low_bytes(first, second);
        _mm512_storeu_si512(out, bytes);
        sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), bytes);
    }
    int32_t lanes[16], sum = 0;
    std::memcpy(lanes, &sums, sizeof sums);
    for (int32_t lane : lanes) sum += lane;
    return sum;
}

// One row of x, or a row of padding without x.
inline void prepare_row(const PackedLayout& layout, const QuantizedRows& rows, const float* x, int64_t row,
                        uint8_t* out) {
    alignas(64) int16_t q[kActivationBlock] = {};
    for (int64_t block = 0; block < rows.blocks(); ++block) {
        const int64_t columns = rows.columns(block), from = block * kActivationBlock;
        const int64_t count = std::min(columns, layout.in_features - from);
        const int bits = rows.planes() == 2 ? 16 : 8;
        const float scale = x ? quantize_block(x + from, count, columns, bits, q) : 0.0f;
        std::memcpy(out + rows.scale_at(block, row), &scale, 4);
        for (int64_t plane = 0; plane < rows.planes(); ++plane) {
            uint8_t* to = out + rows.row_at(block, row, plane);
            const bool is_high = rows.planes() == 2 && plane == 0;
            const int32_t sum = is_high ? write_plane<true>(q, columns, to) : write_plane<false>(q, columns, to);
            const int32_t offset = 128 * sum;
            std::memcpy(out + rows.offset_at(block, plane, row), &offset, 4);
        }
    }
}

inline int64_t prepared_bytes_quantized(const PackedLayout& layout, int64_t rows, int activation_bits) {
    return QuantizedRows(layout, rows, activation_bits).bytes();
}

inline void prepare_quantized(const PackedLayout& layout, int64_t rows, int activation_bits, const float* x,
                              int64_t x_stride, int64_t begin, int64_t end, void* prepared) {
    const QuantizedRows layout_of_rows(layout, rows, activation_bits);
    const int64_t padded_end = end == rows ? layout_of_rows.padded_rows() : end;
    for (int64_t row = begin; row < padded_end; ++row) {
        const float* from = row < rows ? x + row * x_stride : nullptr;
        prepare_row(layout, layout_of_rows, from, row, static_cast<uint8_t*>(prepared));
    }
}

// Groups whose sums are taken together into y: with each group alone, loads and stores of y would cost more time than
// the products of a group of 128 columns.
constexpr int kMostParts = 2;

// Integer sums of a unit over each of a few groups.
struct alignas(64) UnitSums {
    int32_t values[kMostParts][2][2][kTileSide][kPanel];  // [group][panel of the pair][stream][row][feature]
};
constexpr int64_t kStreamSums = kTileSide * kPanel, kPanelSums = 2 * kStreamSums, kPartSums = 2 * kPanelSums;

// What a pair of panels brings to a block.
struct PairWeights {
    const uint8_t* panel[2];    // lines of the block
    const float* group_scales;  // [groups of the block][2 panels][16]; int8: null
};

inline Floats floats_of(Ints v) {
    return __builtin_convertvector(v, Floats);
}

inline Ints load_sums(const int32_t* p) {
    Ints v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// Turns the integer sums of a unit into floats and adds them to y [unit rows][32], a chunk of rows at a time.
template <int kPlanes, bool kGrouped>
class Combiner {
public:
    static constexpr int64_t kUnitRows = 2 * kTileSide / kPlanes;
    static constexpr int64_t kChunks = 8;

    Combiner(const QuantizedRows& rows, const uint8_t* prepared, int64_t block)
        : first_scale_(reinterpret_cast<const float*>(prepared + rows.scale_at(block, 0))),
          first_offset_{reinterpret_cast<const int32_t*>(prepared + rows.offset_at(block, 0, 0)),
                        reinterpret_cast<const int32_t*>(prepared + rows.offset_at(block, kPlanes - 1, 0))} {}

    void start(const UnitSums& sums, int parts, int64_t first_row, const float* group_scales, float* y) {
        sums_ = sums.values[0][0][0][0];
        parts_ = parts;
        row_ = first_row;
        group_scales_ = group_scales;
        y_ = y;
        left_ = kChunks;
    }

    void run(int64_t chunks) {
        for (; chunks > 0 && left_ > 0; --chunks, --left_) {
            if (kGrouped && parts_ == kMostParts) {
                add_chunk<kMostParts>();
            } else {
                add_chunk<1>();
            }
        }
    }

    void drain() { run(kChunks); }

private:
    static constexpr int64_t kRows = kUnitRows / kChunks;

    template <int kParts>
    void add_chunk() {
        Floats group_scale[kParts][2] = {};
        for (int i = 0; kGrouped && i < 2 * kParts; ++i) group_scale[i / 2][i % 2] = load(group_scales_ + i * kPanel);
#pragma GCC unroll 4
        for (int64_t row = 0; row < kRows; ++row) add_row<kParts>(group_scale, row);
        row_ += kRows;
        sums_ += kRows * kPanel;
        y_ += kRows * kPairFeatures;
    }

    template <int kParts>
    void add_row(const Floats (&group_scale)[kParts][2], int64_t row) {
        const Floats scale = broadcast(first_scale_[row_ + row]);
        const Ints high = Ints{} + first_offset_[0][row_ + row], low = Ints{} + first_offset_[1][row_ + row];
#pragma GCC unroll 2
        for (int panel = 0; panel < 2; ++panel) {
            const int32_t* sums = sums_ + panel * kPanelSums + row * kPanel;
            float* y = y_ + row * kPairFeatures + panel * kPanel;
            Floats sum = load(y);
#pragma GCC unroll 2
            for (int part = 0; part < kParts; ++part) {
                const Floats factor = kGrouped ? scale * group_scale[part][panel] : scale;
                sum = multiply_add(total(sums + part * kPartSums, high, low), factor, sum);
            }
            store(y, sum);
        }
    }

    // 256 times the high plane's sum plus the low one's, rounded once; int8 weights are stored with 128 added.
    static Floats total(const int32_t* sums, Ints high_offset, Ints low_offset) {
        const Ints low = load_sums(sums + (kPlanes - 1) * kStreamSums);
        const Floats of_low = floats_of(kGrouped ? low : low - low_offset);
        if (kPlanes == 1) return of_low;
        const Ints high = load_sums(sums);
        return multiply_add(broadcast(256.0f), floats_of(kGrouped ? high : high - high_offset), of_low);
    }

    const float* first_scale_;          // of row 0
    const int32_t* first_offset_[2];    // of row 0: high plane, low plane
    const int32_t* sums_ = nullptr;
    int parts_ = 1;
    const float* group_scales_ = nullptr;
    float* y_ = nullptr;
    int64_t row_ = 0, left_ = 0;
};

template <bool kUnsignedWeights, int kSum, int kA, int kB>
inline void dot_weights() {
    if constexpr (kUnsignedWeights) {
        dot_s8_u8<kSum, kA, kB>();
    } else {
        dot_s8_s8<kSum, kA, kB>();
    }
}

// Sums of both streams of a unit with both panels over columns [begin, end) of a block, [panel][stream]; `between` runs
// in each step.
template <bool kUnsignedWeights, int kDepth, typename Between>
inline void multiply_unit(const uint8_t* unit, int64_t stream_bytes, const PairWeights& weights, int64_t begin,
                          int64_t end, int32_t (&sums)[2][2][kTileSide][kPanel], const Between& between) {
    zero_sums();
    for (int64_t k = begin; k < end; k += kDepth) {
        const uint8_t* a = unit + k / 64 * kTileBytes + k % 64;
        load_tile<6>(weights.panel[0] + k * kPanel, 64);
        load_tile<4>(a, 64);
        dot_weights<kUnsignedWeights, 0, 4, 6>();
        load_tile<7>(weights.panel[1] + k * kPanel, 64);
        dot_weights<kUnsignedWeights, 1, 4, 7>();
        load_tile<5>(a + stream_bytes, 64);
        dot_weights<kUnsignedWeights, 2, 5, 6>();
        dot_weights<kUnsignedWeights, 3, 5, 7>();
        between();
    }
    constexpr int64_t kStride = kPanel * sizeof(int32_t);
    store_tile<0>(sums[0][0], kStride);
    store_tile<1>(sums[1][0], kStride);
    store_tile<2>(sums[0][1], kStride);
    store_tile<3>(sums[1][1], kStride);
}

// Adds one block of columns of all rows times a pair of panels to y [padded rows][32].
template <typename Weights, int kPlanes, int kDepth>
void multiply_pair_block(const QuantizedRows& rows, const uint8_t* prepared, int64_t block, const Weights& source,
                         const PairWeights& weights, const PairBlock& next, float* y) {
    using Combine = Combiner<kPlanes, Weights::kGrouped>;
    const int64_t columns = rows.columns(block), group = source.group_columns(columns), groups = columns / group;
    const int64_t stream_bytes = rows.stream_bytes(block), units = rows.units();
    const uint8_t* unit = prepared + rows.units_at(block);
    Prefetch prefetch = source.prefetch(next, units * (columns / kDepth));
    Combine previous(rows, prepared, block);
    UnitSums sums[2];
    int turn = 0;
    for (int64_t i = 0; i < units; ++i, unit += 2 * stream_bytes, y += Combine::kUnitRows * kPairFeatures) {
        for (int64_t first = 0; first < groups; first += kMostParts, turn ^= 1) {
            const int parts = static_cast<int>(std::min<int64_t>(kMostParts, groups - first));
            const int64_t steps = parts * group / kDepth, chunks_per_step = (Combine::kChunks + steps - 1) / steps;
            for (int part = 0; part < parts; ++part) {
                const int64_t begin = (first + part) * group;
                multiply_unit<Weights::kUnsigned, kDepth>(unit, stream_bytes, weights, begin, begin + group,
                                                          sums[turn].values[part], [&] {
                                                              previous.run(chunks_per_step);
                                                              prefetch.step();
                                                          });
            }
            previous.drain();
            previous.start(sums[turn], parts, i * Combine::kUnitRows, weights.group_scales + first * kPairFeatures, y);
        }
    }
    previous.drain();
}

template <typename Weights, int kPlanes, int kDepth>
void multiply_quantized(const FullyConnectedTask& task, int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    const QuantizedRows rows(task.layout, task.rows, task.activation_bits);
    const int64_t group_pairs = pairs_of_group(rows.tile_bytes()), pair_floats = rows.padded_rows() * kPairFeatures;
    const uint8_t* prepared = static_cast<const uint8_t*>(task.prepared);
    float* sums = scratch.get<float>(group_pairs * pair_floats);
    Weights source(task);
    const TileScope tiles(kTileSide, kDepth);
    const auto multiply = [&](const PairBlock& pair, int64_t first, const PairBlock& next) {
        float* y = sums + (pair.panel - first) / 2 * pair_floats;
        if (pair.block == 0) std::fill(y, y + pair_floats, 0.0f);
        multiply_pair_block<Weights, kPlanes, kDepth>(rows, prepared, pair.block, source, source.load(pair), next, y);
    };
    const auto finish = [&](int64_t first, int64_t last) { finish_group(task, first, last, sums, pair_floats); };
    walk(begin, end, rows.blocks(), group_pairs, multiply, finish);
}

}  // namespace
}  // namespace chatglm::CHATGLM_AMX_LEVEL
