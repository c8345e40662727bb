// Products of signed bytes: rows of x as tiles of planes, and the product of a pair of panels of int8 with them.
//
// Two A tiles, called streams, meet the two panels of a pair: with 16 bits the high and the low plane of 16 rows, with
// 8 bits two times 16 rows. So a unit of rows is 16 or 32 rows, and each of its steps loads 4 tiles for 4 products.
// Integer sums become floats in vector code that runs between the tile products of the next sums (two buffers).
#pragma once

#include "kernels/amx/weights.h"
#include "kernels/memory.h"

namespace chatglm::CHATGLM_AMX_LEVEL {
namespace {

// Layout of `prepared`:
//   tiles   [block][unit][stream][columns / 64][16 rows][64 columns] int8
//   scales  [block][padded rows] float32
//   offsets [block][padded rows] int32: 128 times the sum of the row over the block
class QuantizedRows {
public:
    QuantizedRows(const PackedLayout& layout, int64_t rows, int activation_bits)
        : blocks_{layout.padded_in(), kActivationBlock},
          planes_(activation_bits == 16 ? 2 : 1),
          unit_rows_(2 * kTileSide / planes_),
          padded_rows_(round_up(rows, unit_rows_)) {}

    const Blocks& blocks() const { return blocks_; }
    int64_t planes() const { return planes_; }
    int64_t padded_rows() const { return padded_rows_; }
    int64_t units() const { return padded_rows_ / unit_rows_; }
    int64_t tile_bytes() const { return padded_rows_ * blocks_.padded_in * planes_; }
    int64_t bytes() const { return tile_bytes() + blocks_.count() * padded_rows_ * 4 * 2; }

    // Tiles of the first unit; both streams of a unit lie one after the other, and the next unit behind them.
    int64_t units_at(int64_t block) const { return block * kActivationBlock * padded_rows_ * planes_; }
    int64_t stream_bytes(int64_t block) const { return kTileSide * blocks_.columns_of(block); }

    // First byte of a row in a plane; its next 64 columns are a tile further.
    int64_t row_at(int64_t block, int64_t row, int64_t plane) const {
        const int64_t stream = planes_ == 2 ? plane : row % unit_rows_ / kTileSide;
        const int64_t streams = row / unit_rows_ * 2 + stream;
        return units_at(block) + streams * stream_bytes(block) + row % kTileSide * 64;
    }
    int64_t scale_at(int64_t block, int64_t row) const { return tile_bytes() + (block * padded_rows_ + row) * 4; }
    int64_t offset_at(int64_t block, int64_t row) const { return scale_at(blocks_.count() + block, row); }

private:
    Blocks blocks_;
    int64_t planes_, unit_rows_, padded_rows_;
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

// Writes a row of one plane of a block to its tiles. q = 256 high + low, low in -128..127.
template <bool kHigh>
inline void write_plane(const int16_t* q, int64_t columns, uint8_t* out) {
    for (int64_t i = 0; i < columns; i += 64, out += kTileBytes) {
        __m512i first = load_words(q + i), second = load_words(q + i + 32);
        if constexpr (kHigh) {
            const __m512i half = _mm512_set1_epi16(128);
            first = _mm512_srai_epi16(_mm512_add_epi16(first, half), 8);
            second = _mm512_srai_epi16(_mm512_add_epi16(second, half), 8);
        }
        _mm512_storeu_si512(out, low_bytes(first, second));
    }
}

// One row of x, or a row of padding without x.
inline void prepare_row(const PackedLayout& layout, const QuantizedRows& rows, const float* x, int64_t row,
                        uint8_t* out) {
    alignas(64) int16_t q[kActivationBlock] = {};
    for (int64_t block = 0; block < rows.blocks().count(); ++block) {
        const int64_t columns = rows.blocks().columns_of(block), from = block * kActivationBlock;
        const int64_t count = std::min(columns, layout.in_features - from);
        const int bits = rows.planes() == 2 ? 16 : 8;
        const float scale = x ? quantize_block(x + from, count, columns, bits, q) : 0.0f;
        const int32_t offset = 128 * sum_codes(q, columns);
        std::memcpy(out + rows.scale_at(block, row), &scale, 4);
        std::memcpy(out + rows.offset_at(block, row), &offset, 4);
        write_plane<false>(q, columns, out + rows.row_at(block, row, rows.planes() - 1));
        if (rows.planes() == 2) write_plane<true>(q, columns, out + rows.row_at(block, row, 0));
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

// Integer sums of a unit over a block.
struct alignas(64) UnitSums {
    int32_t values[2][2][kTileSide][kPanel];  // [panel of the pair][stream][row][feature]
};
constexpr int64_t kStreamSums = kTileSide * kPanel, kPanelSums = 2 * kStreamSums;

inline Ints load_sums(const int32_t* p) {
    Ints v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// Turns the integer sums of a unit into floats and adds them to y [unit rows][32], a chunk of rows at a time.
// kUnsigned: weights are stored with 128 added and have no scale here. Others have one a block and feature.
template <int kPlanes, bool kUnsigned>
class Combiner {
public:
    static constexpr int64_t kUnitRows = 2 * kTileSide / kPlanes;
    static constexpr int64_t kChunks = 8;

    Combiner(const QuantizedRows& rows, const uint8_t* prepared, int64_t block, const float* weight_scales)
        : scales_(reinterpret_cast<const float*>(prepared + rows.scale_at(block, 0))),
          offsets_(reinterpret_cast<const int32_t*>(prepared + rows.offset_at(block, 0))),
          weight_scales_(weight_scales) {}

    // The next unit of rows, the first one at the first call.
    void start(const UnitSums& sums, float* y) {
        sums_ = sums.values[0][0][0];
        y_ = y;
        left_ = kChunks;
    }

    void run(int64_t chunks) {
        for (; chunks > 0 && left_ > 0; --chunks, --left_) add_chunk();
    }

    void drain() { run(kChunks); }

private:
    static constexpr int64_t kRows = kUnitRows / kChunks;

    void add_chunk() {
        Floats weight_scale[2] = {};
        for (int panel = 0; !kUnsigned && panel < 2; ++panel) {
            weight_scale[panel] = load(weight_scales_ + panel * kPanel);
        }
#pragma GCC unroll 4
        for (int64_t row = 0; row < kRows; ++row) add_row(weight_scale, row);
        scales_ += kRows;
        offsets_ += kRows;
        sums_ += kRows * kPanel;
        y_ += kRows * kPairFeatures;
    }

    void add_row(const Floats (&weight_scale)[2], int64_t row) {
        const Floats scale = broadcast(scales_[row]);
        const Ints offset = Ints{} + offsets_[row];
#pragma GCC unroll 2
        for (int panel = 0; panel < 2; ++panel) {
            float* y = y_ + row * kPairFeatures + panel * kPanel;
            const Floats factor = kUnsigned ? scale : scale * weight_scale[panel];
            const Floats sum = floats_of(total(sums_ + panel * kPanelSums + row * kPanel, offset));
            store(y, multiply_add(sum, factor, load(y)));
        }
    }

    static Ints total(const int32_t* sums, Ints offset) {
        Ints low = load_sums(sums + (kPlanes - 1) * kStreamSums);
        if (kUnsigned) low = Ints(Bits(low) - Bits(offset));
        return kPlanes == 1 ? low : sum_planes(load_sums(sums), low);
    }

    // Of the next row:
    const float* scales_;
    const int32_t* offsets_;
    const int32_t* sums_ = nullptr;
    float* y_ = nullptr;

    const float* weight_scales_;
    int64_t left_ = 0;
};

template <bool kUnsignedWeights, int kSum, int kA, int kB>
inline void dot_weights() {
    if constexpr (kUnsignedWeights) {
        dot_s8_u8<kSum, kA, kB>();
    } else {
        dot_s8_s8<kSum, kA, kB>();
    }
}

// Sums of both streams of a unit with both panels over a block, [panel][stream]; `between` runs in each step.
template <bool kUnsigned, typename Between>
inline void multiply_unit(const uint8_t* unit, int64_t stream_bytes, const PairLines& lines,
                          int32_t (&sums)[2][2][kTileSide][kPanel], const Between& between) {
    zero_sums();
    for (int64_t at = 0; at < stream_bytes; at += kTileBytes) {
        load_tile<6>(lines.panel[0] + at, 64);
        load_tile<4>(unit + at, 64);
        dot_weights<kUnsigned, 0, 4, 6>();
        load_tile<7>(lines.panel[1] + at, 64);
        dot_weights<kUnsigned, 1, 4, 7>();
        load_tile<5>(unit + stream_bytes + at, 64);
        dot_weights<kUnsigned, 2, 5, 6>();
        dot_weights<kUnsigned, 3, 5, 7>();
        between();
    }
    constexpr int64_t kStride = kPanel * sizeof(int32_t);
    store_tile<0>(sums[0][0], kStride);
    store_tile<1>(sums[1][0], kStride);
    store_tile<2>(sums[0][1], kStride);
    store_tile<3>(sums[1][1], kStride);
}

// Adds one block of columns of all rows times a pair of panels to y [padded rows][32], and brings the next pair.
template <int kPlanes, bool kUnsigned, typename Weights>
void multiply_pair_block(const QuantizedRows& rows, const uint8_t* prepared, int64_t block, Weights& weights,
                         const PairBlock& next, float* y) {
    using Combine = Combiner<kPlanes, kUnsigned>;
    const int64_t stream_bytes = rows.stream_bytes(block), steps = stream_bytes / kTileBytes, units = rows.units();
    const int64_t chunks_per_step = (Combine::kChunks + steps - 1) / steps;
    const uint8_t* unit = prepared + rows.units_at(block);
    const PairLines lines = weights.take();
    weights.start(next, units * steps);
    Combine previous(rows, prepared, block, lines.scales);
    UnitSums sums[2];
    for (int64_t i = 0; i < units; ++i, unit += 2 * stream_bytes, y += Combine::kUnitRows * kPairFeatures) {
        multiply_unit<kUnsigned>(unit, stream_bytes, lines, sums[i % 2].values, [&] {
            previous.run(chunks_per_step);
            weights.step();
        });
        previous.start(sums[i % 2], y);
    }
    previous.drain();
}

template <int kPlanes, bool kUnsigned, typename Weights>
void multiply_quantized(const FullyConnectedTask& task, int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    const QuantizedRows rows(task.layout, task.rows, task.activation_bits);
    const int64_t group_pairs = pairs_of_group(rows.tile_bytes()), pair_floats = rows.padded_rows() * kPairFeatures;
    const uint8_t* prepared = static_cast<const uint8_t*>(task.prepared);
    float* sums = scratch.get<float>(group_pairs * pair_floats);
    Weights weights(task, rows.blocks());
    weights.start(pair_before(end, begin, 0), 1);
    const TileScope tiles(kTileSide, 64);
    const auto multiply = [&](const PairBlock& pair, int64_t first, const PairBlock& next) {
        float* y = sums + (pair.panel - first) / 2 * pair_floats;
        if (pair.block == 0) std::fill(y, y + pair_floats, 0.0f);
        multiply_pair_block<kPlanes, kUnsigned>(rows, prepared, pair.block, weights, next, y);
    };
    const auto finish_group = [&](int64_t first, int64_t last) {
        finish(task, first, last, {sums, kPairFeatures, pair_floats});
    };
    walk(begin, end, rows.blocks().count(), group_pairs, multiply, finish_group);
}

}  // namespace
}  // namespace chatglm::CHATGLM_AMX_LEVEL
