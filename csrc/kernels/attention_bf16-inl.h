// What the kernels do alike that multiply with a bf16 cache in bf16: queries to two numbers, online softmax in float32,
// p to one.
//
// Included by kernels/<level>/attention.cpp only; everything here has internal linkage, see simd-inl.h. Slots are taken
// in steps of 256: scores, softmax, P V. Queries go in as the sum of two bf16 numbers (16 bits); p is rounded to bf16,
// and the sum of p is that of the rounded ones.
#pragma once

#include "kernels/attention-inl.h"

namespace chatglm {
namespace {

constexpr int64_t kStepBlocks = kStepSlots / kBlockSlots;

typedef uint16_t HalfLine __attribute__((vector_size(32)));

inline HalfLine to_bf16(Floats v) {
    const __m256bh rounded = _mm512_cvtneps_pbh(__m512(v));
    HalfLine bits;
    std::memcpy(&bits, &rounded, sizeof bits);
    return bits;
}

inline Floats from_bf16(HalfLine v) {
    // Under this mask it is the plain instruction; GCC 12 warns of its own header's form without one.
    return floats_of_bits(Ints(_mm512_maskz_cvtepu16_epi32(0xffff, __m256i(v))) << 16);
}

// Whether a cache is one that these kernels read: bf16 with whole lines of 32 dims.
inline bool is_whole_bf16(const CacheLayout& layout) {
    return layout.type == CacheType::bf16 && layout.padded_dim() % kLine == 0;
}

// One tile, but its products.
class Bf16Run {
protected:
    explicit Bf16Run(const AttentionTile& tile)
        : tile_(tile),
          dim_(tile.layout.padded_dim()),
          end_(std::min(tile.end, *std::max_element(tile.visible, tile.visible + tile.rows))),
          query_(query_memory().get<uint16_t>(2 * tile.rows * dim_)),
          last_values_(values_memory().get<uint16_t>(kBlockSlots * dim_)) {
        std::fill(tile.context, tile.context + tile.rows * dim_, 0.0f);
        std::fill(tile.max, tile.max + tile.rows, -kInfinity);
        std::fill(tile.sum, tile.sum + tile.rows, 0.0f);
        split_query();
        if (end_ % kBlockSlots != 0 && end_ > tile.begin) copy_last_values();
    }

    const uint8_t* keys(int64_t block) const { return tile_.blocks[block]; }

    const uint8_t* values(int64_t block) const {
        const bool is_copied = block == end_ / kBlockSlots;
        return is_copied ? reinterpret_cast<const uint8_t*>(last_values_)
                         : tile_.blocks[block] + tile_.layout.value_offset();
    }

    // Scores of a row to p, with the context and the sum of earlier steps brought to the new maximum. Slots that the
    // row does not see are left out by selection: their scores may be NaN.
    void update_softmax(int64_t row, int64_t begin, int64_t slots) {
        float* scores = weight_ + row * kStepStride;
        const int64_t seen = std::clamp<int64_t>(tile_.visible[row] - begin, 0, slots);
        const int64_t whole = round_up(slots, kBlockSlots);
        Floats largest = broadcast(-kInfinity);
        for (int64_t at = 0; at < seen; at += kLanes) {
            largest = max_of(first_lanes(seen - at) ? load(scores + at) : broadcast(-kInfinity), largest);
        }
        const float max = std::max(largest_of(largest), tile_.max[row]);
        Floats sum{};
        for (int64_t at = 0; at < whole; at += kLanes) {
            const int64_t count = std::max<int64_t>(seen - at, 0);
            sum += store_weights(row, at, count, count > 0 ? exp_of(load(scores + at) - max) : Floats{});
        }
        if (seen == 0) return;
        const Floats factor = exp_of(broadcast(tile_.max[row] - max));
        float* context = tile_.context + row * dim_;
        for (int64_t d = 0; d < dim_; d += kLanes) store(context + d, load(context + d) * factor);
        tile_.sum[row] = tile_.sum[row] * factor[0] + sum_of(sum);
        tile_.max[row] = max;
    }

private:
    static Scratch& query_memory() {
        static thread_local Scratch memory;
        return memory;
    }
    static Scratch& values_memory() {
        static thread_local Scratch memory;
        return memory;
    }

    void split_query() {
        for (int64_t row = 0; row < tile_.rows; ++row) {
            for (int64_t d = 0; d < dim_; d += kLanes) {
                const Floats q = load(tile_.query + row * dim_ + d);
                const HalfLine high = to_bf16(q), low = to_bf16(q - from_bf16(high));
                uint16_t* to = query_ + (d / kLine * 2 * tile_.rows + row) * kLine + d % kLine;
                std::memcpy(to, &high, sizeof high);
                std::memcpy(to + tile_.rows * kLine, &low, sizeof low);
            }
        }
    }

    // Values of the last block with zeros from `end_` on: p = 0 there, but 0 times NaN is NaN. A line is two slots of
    // 16 dims, the first one in the low halves of its words.
    void copy_last_values() {
        const int64_t valid = end_ % kBlockSlots;
        const auto* values = reinterpret_cast<const uint16_t*>(tile_.blocks[end_ / kBlockSlots] +
                                                               tile_.layout.value_offset());
        for (int64_t d = 0; d < dim_; d += kLanes) {
            for (int64_t slot = 0; slot < kBlockSlots; slot += 2) {
                const int64_t at = tile_.layout.value_index(slot, d);
                Ints line{};
                if (slot < valid) std::memcpy(&line, values + at, sizeof line);
                if (slot + 1 == valid) line &= 0xffff;
                std::memcpy(last_values_ + at, &line, sizeof line);
            }
        }
    }

    // p of 16 slots of a row, of which `count` are seen; returns them as rounded.
    Floats store_weights(int64_t row, int64_t at, int64_t count, Floats p) {
        const HalfLine rounded = to_bf16(first_lanes(count) ? p : Floats{});
        std::memcpy(rounded_ + (at / kBlockSlots * tile_.rows + row) * kBlockSlots + at % kBlockSlots, &rounded,
                    sizeof rounded);
        return from_bf16(rounded);
    }

protected:
    const AttentionTile& tile_;
    const int64_t dim_;
    const int64_t end_;  // behind it no row sees anything
    uint16_t* query_;    // [dim / 32][high, low][row][32 dims]

private:
    uint16_t* last_values_;

protected:
    alignas(64) float weight_[kTileRows * kStepStride];     // scores [row][slot of the step]
    alignas(64) uint16_t rounded_[kTileRows * kStepSlots];  // p [block of the step][row][32 slots]
};

}  // namespace
}  // namespace chatglm
