// Attention over an int8 cache by VNNI's dot product of words: queries and p are 16-bit integers, elements of the cache
// are widened as they are read, and sums are exact.
//
// A query row is q = s rint(q / s) with s = max|q| / 32767. p is multiplied by the scale of its value and goes in with
// a scale for each row and step of 256 slots, which is that of the largest of them. Rows are taken 8, 4, 2, 1 at a time
// and lines beside each other as in attention-inl.h, which does all else: caches in f32 and bf16, and heads of more
// than 512 dims, whose sums could exceed 32 bits.
#include <cfloat>

#include "kernels/attention-inl.h"
#include "kernels/levels.h"

namespace chatglm {
namespace {

constexpr float kMostWord = 32767.0f;
constexpr int64_t kMostDims = 512;
constexpr int kMostWordRows = 8;
constexpr int64_t kByteLine = 32;  // bytes of a line: pairs of dims of 16 slots, or of slots of 16 dims

// rint(x * inverse), which is at most kMostWord.
inline Shorts words_of(Floats x, float inverse) {
    const Floats shift = broadcast(kRoundingShift);
    return __builtin_convertvector(bits_of(x * inverse + shift) - bits_of(shift), Shorts);
}

// What numbers are divided by, the largest of which has these bits, as a positive number. NaN if it is not finite.
inline float scale_of(Ints largest) {
    int32_t bits = 0;
    for (int i = 0; i < kLanes; ++i) bits = std::max(bits, largest[i]);
    if (bits >= 0x7f800000) return std::numeric_limits<float>::quiet_NaN();
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return std::max(value / kMostWord, FLT_MIN);
}

// 0 for NaN: what is not finite becomes words that do not matter.
inline float inverse_of(float scale) {
    return scale == scale ? 1.0f / scale : 0.0f;
}

inline Ints larger_of(Ints a, Ints b) {
    return a > b ? a : b;
}

// Adds the products of lines, side by side, and the pair of words of each row, `stride` words apart.
template <int kRows, int kLines>
[[gnu::always_inline]] inline void add_word_pairs(Ints (&sums)[kLines][kRows], const uint8_t* const (&lines)[kLines],
                                                  const int16_t* words, int64_t stride) {
    __m512i wide[kLines];
#pragma GCC unroll 4
    for (int i = 0; i < kLines; ++i) {
        wide[i] = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(lines[i])));
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
        int32_t pair;
        std::memcpy(&pair, words + r * stride, sizeof pair);
        const __m512i broadcast_pair = _mm512_set1_epi32(pair);
#pragma GCC unroll 4
        for (int i = 0; i < kLines; ++i) {
            sums[i][r] = Ints(_mm512_dpwssd_epi32(__m512i(sums[i][r]), wide[i], broadcast_pair));
        }
    }
}

class WordRun {
public:
    explicit WordRun(const AttentionTile& tile)
        : tile_(tile),
          dim_(tile.layout.padded_dim()),
          end_(std::min(tile.end, *std::max_element(tile.visible, tile.visible + tile.rows))) {
        std::fill(tile.context, tile.context + tile.rows * dim_, 0.0f);
        std::fill(tile.max, tile.max + tile.rows, -kInfinity);
        std::fill(tile.sum, tile.sum + tile.rows, 0.0f);
        for (int64_t row = 0; row < tile.rows; ++row) quantize_query(row);
    }

    void run() {
        for (int64_t begin = tile_.begin; begin < end_; begin += kStepSlots) {
            const int64_t slots = std::min(kStepSlots, end_ - begin);
            compute_scores(begin, slots);
            for (int64_t row = 0; row < tile_.rows; ++row) update_softmax(row, begin, slots);
            accumulate_values(begin, slots);
        }
    }

private:
    void quantize_query(int64_t row) {
        const float* q = tile_.query + row * dim_;
        Ints largest{};
        for (int64_t d = 0; d < dim_; d += kLanes) largest = larger_of(bits_of(absolute(load(q + d))), largest);
        query_scale_[row] = scale_of(largest);
        const float inverse = inverse_of(query_scale_[row]);
        for (int64_t d = 0; d < dim_; d += kLanes) store_words(query_ + row * dim_ + d, load(q + d), inverse);
    }

    static void store_words(int16_t* to, Floats x, float inverse) {
        const Shorts words = words_of(x, inverse);
        std::memcpy(to, &words, sizeof words);
    }

    const uint8_t* block(int64_t slot) const { return tile_.blocks[slot / kBlockSlots]; }

    // Keys of the 16 slots from `slot` on, and half of the values of its block.
    const uint8_t* half(int64_t slot, int64_t part_offset) const {
        return block(slot) + part_offset + slot % kBlockSlots / kHalfSlots * kHalfSlots * dim_;
    }

    const float* scales(int64_t slot, int64_t part_offset) const {
        return reinterpret_cast<const float*>(block(slot) + part_offset) + slot % kBlockSlots;
    }

    // What is brought into the cache while the keys of 16 slots are multiplied: their values, and keys further on.
    struct Ahead {
        const uint8_t *keys, *values;
    };

    Ahead ahead(int64_t slot) const {
        const int64_t later = slot + kMostLines * kHalfSlots;
        prefetch(scales(slot, tile_.layout.value_scale_offset()));
        if (later >= tile_.ahead_end) return {half(slot, 0), half(slot, tile_.layout.value_offset())};
        prefetch(scales(later, tile_.layout.key_scale_offset()));
        return {half(later, 0), half(slot, tile_.layout.value_offset())};
    }

    void compute_scores(int64_t begin, int64_t slots) {
        for (int64_t at = 0; at < slots; at += kMostLines * kHalfSlots) {
            const uint8_t* keys[kMostLines];
            Ahead next[kMostLines];
            const int64_t halves = std::min<int64_t>(kMostLines, (slots - at + kHalfSlots - 1) / kHalfSlots);
            for (int64_t i = 0; i < halves; ++i) {
                keys[i] = half(begin + at + i * kHalfSlots, 0);
                next[i] = ahead(begin + at + i * kHalfSlots);
            }
            split_rows<kMostWordRows>(0, tile_.rows, [&](auto rows, int64_t row) {
                split_lines<kLinesOf<rows()>>(halves, [&](auto count, int64_t i) {
                    multiply_keys<rows(), count()>(row, keys + i, next + i,
                                                   weight_ + row * kStepStride + at + i * kHalfSlots);
                });
            });
        }
    }

    template <int kRows, int kLines>
    void multiply_keys(int64_t row, const uint8_t* const* keys, const Ahead* next, float* scores) const {
        Ints sums[kLines][kRows] = {};
        const int16_t* words = query_ + row * dim_;
        for (int64_t d = 0; d < dim_; d += 4) {
            const int64_t at = d / 2 * kByteLine;
            const uint8_t *first[kLines], *second[kLines];
#pragma GCC unroll 4
            for (int i = 0; i < kLines; ++i) {
                first[i] = keys[i] + at;
                second[i] = first[i] + kByteLine;
                prefetch(next[i].keys + at);
                prefetch(next[i].values + at);
            }
            add_word_pairs(sums, first, words + d, dim_);
            add_word_pairs(sums, second, words + d + 2, dim_);
        }
        for (int i = 0; i < kLines; ++i) {
            for (int r = 0; r < kRows; ++r) {
                const Floats score = __builtin_convertvector(sums[i][r], Floats) * query_scale_[row + r];
                store(scores + r * kStepStride + i * kHalfSlots, score);
            }
        }
    }

    // Scores of a row to words of p times the scale of its value, with the context and the sum of earlier steps brought
    // to the new maximum. What the row does not see, scales included, may be NaN: selection leaves it out.
    void update_softmax(int64_t row, int64_t begin, int64_t slots) {
        float* weight = weight_ + row * kStepStride;
        int16_t* words = words_ + row * kStepSlots;
        const int64_t seen = std::clamp<int64_t>(tile_.visible[row] - begin, 0, slots);
        std::fill(words, words + round_up(slots, kBlockSlots), int16_t{0});
        weight_scale_[row] = 0.0f;
        if (seen == 0) return;
        Floats largest = broadcast(-kInfinity);
        for (int64_t at = 0; at < seen; at += kLanes) {
            const Floats score = load(weight + at) * load(scales(begin + at, tile_.layout.key_scale_offset()));
            const Floats visible = first_lanes(seen - at) ? score : broadcast(-kInfinity);
            store(weight + at, visible);
            largest = max_of(visible, largest);
        }
        const float max = std::max(largest_of(largest), tile_.max[row]);
        Floats sum{};
        Ints largest_weight{};
        for (int64_t at = 0; at < seen; at += kLanes) {
            const Floats p = exp_of(load(weight + at) - max);
            const Floats scaled = p * load(scales(begin + at, tile_.layout.value_scale_offset()));
            const Floats visible = first_lanes(seen - at) ? scaled : Floats{};
            sum += p;
            store(weight + at, visible);
            largest_weight = larger_of(bits_of(absolute(visible)), largest_weight);
        }
        weight_scale_[row] = scale_of(largest_weight);
        const float inverse = inverse_of(weight_scale_[row]);
        for (int64_t at = 0; at < seen; at += kLanes) store_words(words + at, load(weight + at), inverse);
        const Floats factor = exp_of(broadcast(tile_.max[row] - max));
        float* context = tile_.context + row * dim_;
        for (int64_t d = 0; d < dim_; d += kLanes) store(context + d, load(context + d) * factor);
        tile_.sum[row] = tile_.sum[row] * factor[0] + sum_of(sum);
        tile_.max[row] = max;
    }

    void accumulate_values(int64_t begin, int64_t slots) {
        split_rows<kMostWordRows>(0, tile_.rows, [&](auto rows, int64_t row) {
            split_lines<kLinesOf<rows()>>(dim_ / 16, [&](auto count, int64_t group) {
                multiply_values<rows(), count()>(row, group, begin, slots);
            });
        });
    }

    // Adds to 16 kLines dims of the context, from group * 16 on.
    template <int kRows, int kLines>
    void multiply_values(int64_t row, int64_t group, int64_t begin, int64_t slots) const {
        constexpr int64_t kGroupBytes = kHalfSlots * kByteLine;
        Ints sums[kLines][kRows] = {};
        for (int64_t at = 0; at < slots; at += kBlockSlots) {
            const uint8_t* values = block(begin + at) + tile_.layout.value_offset() + group * kGroupBytes;
            const int16_t* words = words_ + row * kStepSlots + at;
            for (int64_t pair = 0; pair < kHalfSlots; ++pair, words += 2) {
                const uint8_t* lines[kLines];
#pragma GCC unroll 4
                for (int i = 0; i < kLines; ++i) lines[i] = values + i * kGroupBytes + pair * kByteLine;
                add_word_pairs(sums, lines, words, kStepSlots);
            }
        }
        for (int i = 0; i < kLines; ++i) {
            for (int r = 0; r < kRows; ++r) {
                float* context = tile_.context + (row + r) * dim_ + (group + i) * 16;
                const Floats sum = __builtin_convertvector(sums[i][r], Floats);
                store(context, load(context) + sum * weight_scale_[row + r]);
            }
        }
    }

    const AttentionTile& tile_;
    const int64_t dim_;
    const int64_t end_;  // behind it no row sees anything
    float query_scale_[kTileRows], weight_scale_[kTileRows];
    alignas(64) int16_t query_[kTileRows * kMostDims];   // [row][padded_dim]
    alignas(64) float weight_[kTileRows * kStepStride];  // scores [row][slot of the step], then p times scales
    alignas(64) int16_t words_[kTileRows * kStepSlots];  // [row][slot of the step]
};

void attend_words(const AttentionTile& tile) {
    if (tile.layout.type == CacheType::int8 && tile.layout.padded_dim() <= kMostDims) {
        WordRun(tile).run();
    } else {
        attend(tile);
    }
}

}  // namespace

namespace avx512 {

AttentionKernel attention() {
    return {append, attend_words, merge};
}

}  // namespace avx512
}  // namespace chatglm
