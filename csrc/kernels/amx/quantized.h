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

// Layout of `prepared`:
//   tiles   [block][unit][stream][columns / 64][16 rows][64 columns] int8
//   scales  [block][padded rows] float32
//   offsets [block][plane][padded rows] int32: 128 times the sum of a plane over the block
class QuantizedRows {
public:
    QuantizedRows(const PackedLayout& layout, int64_t rows, int activation_bits)
        : layout_(layout),
          planes_(activation_bits == 16 ? 2 : 1),
          unit_rows_(2 * kTileSide / planes_),
          padded_rows_(round_up(rows, unit_rows_)) {}

    int64_t planes() const { return planes_; }
    int64_t unit_rows() const { return unit_rows_; }
    int64_t padded_rows() const { return padded_rows_; }
    int64_t units() const { return padded_rows_ / unit_rows_; }
    int64_t tile_bytes() const { return padded_rows_ * layout_.padded_in() * planes_; }
    int64_t bytes() const { return tile_bytes() + activation_blocks(layout_) * padded_rows_ * 4 * (1 + planes_); }

    // Tiles of both streams of a unit; the second stream is stream_bytes further.
    int64_t unit_at(int64_t block, int64_t unit) const {
        return block * kActivationBlock * padded_rows_ * planes_ + unit * 2 * stream_bytes(block);
    }
    int64_t stream_bytes(int64_t block) const { return kTileSide * block_columns(layout_, block); }

    // First byte of a row in a plane; its next 64 columns are 1024 bytes further.
    int64_t row_at(int64_t block, int64_t row, int64_t plane) const {
        const int64_t stream = planes_ == 2 ? plane : row % unit_rows_ / kTileSide;
        return unit_at(block, row / unit_rows_) + stream * stream_bytes(block) + row % kTileSide * 64;
    }
    int64_t scale_at(int64_t block, int64_t row) const { return tile_bytes() + (block * padded_rows_ + row) * 4; }
    int64_t offset_at(int64_t block, int64_t plane, int64_t row) const {
        const int64_t scales = activation_blocks(layout_) * padded_rows_;
        return tile_bytes() + (scales + (block * planes_ + plane) * padded_rows_ + row) * 4;
    }

private:
    PackedLayout layout_;
    int64_t planes_, unit_rows_, padded_rows_;
};

// Writes one plane of a row of a block and returns its sum. q = 256 hi + lo with lo in -128..127.
template <bool kHigh>
inline int32_t write_plane(const int16_t* q, int64_t columns, int8_t* out) {
    int32_t sum = 0;
    for (int64_t i = 0; i < columns; i += 64, out += kTileSide * 64) {
        for (int64_t j = 0; j < 64; ++j) {
            const int8_t part = static_cast<int8_t>(kHigh ? (q[i + j] + 128) >> 8 : q[i + j]);
            sum += part;
            out[j] = part;
        }
    }
    return sum;
}

// One row of x, or a row of padding without x.
inline void prepare_row(const PackedLayout& layout, const QuantizedRows& rows, const float* x, int64_t row,
                        uint8_t* out) {
    alignas(64) int16_t q[kActivationBlock] = {};
    for (int64_t block = 0; block < activation_blocks(layout); ++block) {
        const int64_t columns = block_columns(layout, block), from = block * kActivationBlock;
        const int64_t count = std::min(columns, layout.in_features - from);
        const int bits = rows.planes() == 2 ? 16 : 8;
        const float scale = x ? quantize_block(x + from, count, columns, bits, q) : 0.0f;
        std::memcpy(out + rows.scale_at(block, row), &scale, 4);
        for (int64_t plane = 0; plane < rows.planes(); ++plane) {
            int8_t* to = reinterpret_cast<int8_t*>(out + rows.row_at(block, row, plane));
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
    int32_t values[kMostParts][2][2][kTileSide][kPanel];  // [group][stream][panel of the pair][row][feature]
};

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

// Turns the integer sums of a unit into floats and adds them to y [unit rows][32], a few rows at a time.
template <int kPlanes, bool kGrouped>
class Combiner {
public:
    Combiner(const QuantizedRows& rows, const uint8_t* prepared, int64_t block)
        : rows_(rows), prepared_(prepared), block_(block) {}

    void start(const UnitSums* sums, int parts, int64_t first_row, const float* group_scales, float* y) {
        sums_ = sums;
        parts_ = parts;
        scales_ = reinterpret_cast<const float*>(prepared_ + rows_.scale_at(block_, first_row));
        for (int64_t plane = 0; plane < kPlanes; ++plane) {
            offsets_[plane] = reinterpret_cast<const int32_t*>(prepared_ + rows_.offset_at(block_, plane, first_row));
        }
        group_scales_ = group_scales;
        y_ = y;
        next_ = 0;
    }

    void run(int64_t count) {
        const int64_t end = std::min(next_ + count, kRows);
        if (next_ == end) return;
        if (kGrouped && parts_ == 2) {
            run_parts<kMostParts>(end);
        } else {
            run_parts<1>(end);
        }
        next_ = end;
    }

    void drain() { run(kRows); }

private:
    static constexpr int64_t kRows = 2 * kTileSide / kPlanes;

    template <int kParts>
    void run_parts(int64_t end) {
        Floats group_scale[kParts][2] = {};
        for (int i = 0; kGrouped && i < 2 * kParts; ++i) group_scale[i / 2][i % 2] = load(group_scales_ + i * kPanel);
        for (int64_t row = next_; row < end; ++row) {
            const Floats scale = broadcast(scales_[row]);
            const Ints high_offset = Ints{} + offsets_[0][row], low_offset = Ints{} + offsets_[kPlanes - 1][row];
            for (int panel = 0; panel < 2; ++panel) {
                float* y = y_ + row * kPairFeatures + panel * kPanel;
                Floats sum = load(y);
                for (int part = 0; part < kParts; ++part) {
                    const Floats factor = kGrouped ? scale * group_scale[part][panel] : scale;
                    sum = multiply_add(total(part, panel, row, high_offset, low_offset), factor, sum);
                }
                store(y, sum);
            }
        }
    }

    // 256 times the high plane's sum plus the low one's, rounded once; int8 weights are stored with 128 added.
    Floats total(int part, int panel, int64_t row, Ints high_offset, Ints low_offset) const {
        const auto& sums = sums_->values[part];
        if (kPlanes == 1) {
            const Ints sum = load_sums(sums[row / kTileSide][panel][row % kTileSide]);
            return floats_of(kGrouped ? sum : sum - low_offset);
        }
        const Ints high = load_sums(sums[0][panel][row]), low = load_sums(sums[1][panel][row]);
        return multiply_add(broadcast(256.0f), floats_of(kGrouped ? high : high - high_offset),
                            floats_of(kGrouped ? low : low - low_offset));
    }

    const QuantizedRows& rows_;
    const uint8_t* prepared_;
    int64_t block_;
    const UnitSums* sums_ = nullptr;
    int parts_ = 1;
    const float* scales_ = nullptr;
    const int32_t* offsets_[2] = {};
    const float* group_scales_ = nullptr;
    float* y_ = nullptr;
    int64_t next_ = kRows;
};

template <bool kUnsignedWeights, int kSum, int kA, int kB>
inline void dot_weights() {
    if constexpr (kUnsignedWeights) {
        dot_s8_u8<kSum, kA, kB>();
    } else {
        dot_s8_s8<kSum, kA, kB>();
    }
}

// Sums of both streams of a unit with both panels over columns [begin, end) of a block; `between` runs in each step.
template <bool kUnsignedWeights, int kDepth, typename Between>
inline void multiply_unit(const uint8_t* unit, int64_t stream_bytes, const PairWeights& weights, int64_t begin,
                          int64_t end, int32_t (&sums)[2][2][kTileSide][kPanel], const Between& between) {
    zero_sums();
    for (int64_t k = begin; k < end; k += kDepth) {
        const uint8_t* a = unit + k / 64 * kTileSide * 64 + k % 64;
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
    store_tile<1>(sums[0][1], kStride);
    store_tile<2>(sums[1][0], kStride);
    store_tile<3>(sums[1][1], kStride);
}

// Adds one block of columns of all rows times a pair of panels to y [padded rows][32].
template <typename Weights, int kPlanes, int kDepth>
void multiply_pair_block(const QuantizedRows& rows, const uint8_t* prepared, int64_t block, int64_t columns,
                         const Weights& source, const PairWeights& weights, const PairBlock& next, float* y) {
    const int64_t group = source.group_columns(columns), groups = columns / group, unit_rows = rows.unit_rows();
    Prefetch prefetch = source.prefetch(next, rows.units() * (columns / kDepth));
    Combiner<kPlanes, Weights::kGrouped> previous(rows, prepared, block);
    UnitSums sums[2];
    int turn = 0;
    for (int64_t unit = 0; unit < rows.units(); ++unit) {
        for (int64_t first = 0; first < groups; first += kMostParts, turn ^= 1) {
            const int parts = static_cast<int>(std::min<int64_t>(kMostParts, groups - first));
            const int64_t steps = parts * group / kDepth, rows_per_step = (unit_rows + steps - 1) / steps;
            for (int part = 0; part < parts; ++part) {
                const int64_t begin = (first + part) * group;
                multiply_unit<Weights::kUnsigned, kDepth>(prepared + rows.unit_at(block, unit),
                                                          rows.stream_bytes(block), weights, begin, begin + group,
                                                          sums[turn].values[part], [&] {
                                                              previous.run(rows_per_step);
                                                              prefetch.step();
                                                          });
            }
            previous.drain();
            previous.start(&sums[turn], parts, unit * unit_rows, weights.group_scales + first * kPairFeatures,
                           y + unit * unit_rows * kPairFeatures);
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
        multiply_pair_block<Weights, kPlanes, kDepth>(rows, prepared, pair.block,
                                                      block_columns(task.layout, pair.block), source,
                                                      source.load(pair), next, y);
    };
    const auto finish_group = [&](int64_t first, int64_t last) {
        for (int64_t panel = first; panel < last; panel += 2) {
            finish(task, panel, std::min(panel + 2, last), sums + (panel - first) / 2 * pair_floats, kPairFeatures);
        }
    };
    walk(begin, end, activation_blocks(task.layout), group_pairs, multiply, finish_group);
}

}  // namespace
}  // namespace chatglm::CHATGLM_AMX_LEVEL
