// Attention by the BF16 dot product, for a bf16 cache: two dims of a key, or two values, a product.
//
// Rows are taken 16, 8, 4, 2, 1 at a time and lines beside each other as in attention-inl.h. A score is one chain over
// pairs of dims, the high part of the query before the low one; the context of a step is one over pairs of slots.
#include "kernels/attention_bf16-inl.h"
#include "kernels/levels.h"

namespace chatglm {
namespace {

// Adds the products of lines, side by side, and the pair of each row, `stride` elements apart.
template <int kRows, int kLines>
[[gnu::always_inline]] inline void add_pairs(Floats (&sums)[kLines][kRows], const __m512i (&lines)[kLines],
                                             const uint16_t* pairs, int64_t stride) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
        int32_t word;
        std::memcpy(&word, pairs + r * stride, sizeof word);
        const __m512i pair = _mm512_set1_epi32(word);
#pragma GCC unroll 4
        for (int i = 0; i < kLines; ++i) {
            sums[i][r] = Floats(_mm512_dpbf16_ps(__m512(sums[i][r]), (__m512bh)lines[i], (__m512bh)pair));
        }
    }
}

constexpr int kMostDotRows = 8;

class DotRun : Bf16Run {
public:
    explicit DotRun(const AttentionTile& tile) : Bf16Run(tile) {}

    void run() {
        for (int64_t begin = tile_.begin; begin < end_; begin += kStepSlots) {
            const int64_t slots = std::min(kStepSlots, end_ - begin);
            compute_scores(begin, slots);
            for (int64_t row = 0; row < tile_.rows; ++row) update_softmax(row, begin, slots);
            accumulate_values(begin, slots);
        }
    }

private:
    static constexpr int64_t kLineBytes = 64;

    int64_t half_bytes() const { return kHalfSlots * dim_ * 2; }

    // Keys of the 16 slots from `slot` on, and what is read 64 slots later: values after the last keys of a step.
    const uint8_t* half(int64_t slot) const {
        return keys(slot / kBlockSlots) + slot % kBlockSlots / kHalfSlots * half_bytes();
    }
    const uint8_t* behind_keys(int64_t begin, int64_t slots, int64_t at) const {
        const int64_t next = at + kMostLines * kHalfSlots;
        if (next < slots) return half(begin + next);
        const int64_t value_slot = begin + std::min(next - round_up(slots, kHalfSlots), slots - 1);
        return values(value_slot / kBlockSlots) + value_slot % kBlockSlots / kHalfSlots * half_bytes();
    }
    const uint8_t* behind_values(int64_t begin, int64_t slots, int64_t at) const {
        const int64_t next = at + kMostLines * kHalfSlots;
        if (next < slots) return values((begin + next) / kBlockSlots);
        const int64_t later = begin + kStepSlots + next - round_up(slots, kBlockSlots);
        return keys((later < tile_.ahead_end ? later : begin) / kBlockSlots);
    }

    void compute_scores(int64_t begin, int64_t slots) {
        for (int64_t at = 0; at < slots; at += kMostLines * kHalfSlots) {
            const uint8_t *lines[kMostLines], *next[kMostLines];
            const int64_t halves = std::min<int64_t>(kMostLines, (slots - at + kHalfSlots - 1) / kHalfSlots);
            for (int64_t i = 0; i < halves; ++i) {
                lines[i] = half(begin + at + i * kHalfSlots);
                next[i] = behind_keys(begin, slots, at + i * kHalfSlots);
            }
            split_rows<kMostDotRows>(0, tile_.rows, [&](auto rows, int64_t row) {
                split_lines<kLinesOf<rows()>>(halves, [&](auto count, int64_t i) {
                    multiply_keys<rows(), count()>(row, lines + i, next + i,
                                                   weight_ + row * kStepStride + at + i * kHalfSlots);
                });
            });
        }
    }

    template <int kRows, int kLines>
    void multiply_keys(int64_t row, const uint8_t* const* lines, const uint8_t* const* next, float* scores) const {
        Floats sums[kLines][kRows] = {};
        const uint16_t* high = query_ + row * kLine;
        for (int64_t d = 0; d < dim_; d += kLine, high += (2 * tile_.rows - 1) * kLine) {
            for (int64_t pair = 0; pair < kLine / 2; ++pair, high += 2) {
                const uint16_t* low = high + tile_.rows * kLine;
                // Else each row's address is a register of its own.
                asm("" : "+r"(low));
                __m512i keys[kLines];
#pragma GCC unroll 4
                for (int i = 0; i < kLines; ++i) {
                    const int64_t at = (d / 2 + pair) * kLineBytes;
                    keys[i] = _mm512_loadu_si512(lines[i] + at);
                    prefetch(next[i] + at);
                }
                add_pairs(sums, keys, high, kLine);
                add_pairs(sums, keys, low, kLine);
            }
        }
        for (int i = 0; i < kLines; ++i) {
            for (int r = 0; r < kRows; ++r) store(scores + r * kStepStride + i * kHalfSlots, sums[i][r]);
        }
    }

    void accumulate_values(int64_t begin, int64_t slots) {
        for (int64_t at = 0; at < slots; at += kBlockSlots) {
            const uint8_t* block = values((begin + at) / kBlockSlots);
            const uint8_t* next = behind_values(begin, slots, at);
            split_rows<kMostDotRows>(0, tile_.rows, [&](auto rows, int64_t row) {
                split_lines<kLinesOf<rows()>>(dim_ / 16, [&](auto count, int64_t group) {
                    const int64_t from = group * kHalfSlots * kLineBytes;
                    const uint16_t* p = rounded_ + (at / kBlockSlots * tile_.rows + row) * kBlockSlots;
                    multiply_values<rows(), count()>(p, block + from, next + from,
                                                     tile_.context + row * dim_ + group * 16);
                });
            });
        }
    }

    template <int kRows, int kLines>
    void multiply_values(const uint16_t* p, const uint8_t* block, const uint8_t* next, float* context) const {
        Floats sums[kLines][kRows];
        for (int i = 0; i < kLines; ++i) {
            for (int r = 0; r < kRows; ++r) sums[i][r] = load(context + r * dim_ + i * 16);
        }
        for (int64_t pair = 0; pair < kHalfSlots; ++pair) {
            __m512i lines[kLines];
#pragma GCC unroll 4
            for (int i = 0; i < kLines; ++i) {
                const int64_t at = (i * kHalfSlots + pair) * kLineBytes;
                lines[i] = _mm512_loadu_si512(block + at);
                prefetch(next + at);
            }
            add_pairs(sums, lines, p + 2 * pair, kBlockSlots);
        }
        for (int i = 0; i < kLines; ++i) {
            for (int r = 0; r < kRows; ++r) store(context + r * dim_ + i * 16, sums[i][r]);
        }
    }
};

void attend_pairs(const AttentionTile& tile) {
    static const AttentionKernel below = avx512::attention();
    if (is_whole_bf16(tile.layout)) {
        DotRun(tile).run();
    } else {
        below.attend(tile);
    }
}

}  // namespace

namespace avx512_bf16 {

AttentionKernel attention() {
    const AttentionKernel below = avx512::attention();
    return {below.append, attend_pairs, below.merge};
}

}  // namespace avx512_bf16
}  // namespace chatglm
