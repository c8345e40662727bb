// Attention of a tile of query rows over the KV cache, in float32 arithmetic.
//
// Included by kernels/<level>/attention.cpp only; everything here has internal linkage, see simd-inl.h.
//
// The slots are taken in steps: scores Q K^T of a step, online softmax, P V. Rows are taken 16, 8, 4, 2, 1 at a time
// (AVX2: from 4), so that a line of the cache, once widened, serves them all; fewer rows take more lines at a time, so
// that there are always enough sums to hide the latency of a multiply-add. Each sum is one chain over dims or slots in
// rising order whatever the number of rows: a row has the same result in every tile.
#pragma once

#include <algorithm>
#include <type_traits>

#include "kernels/memory.h"
#include "kernels/simd-inl.h"
#include "kernels/table.h"

namespace chatglm {
namespace {

constexpr int kParts = 16 / kLanes;                // vectors of the even, or odd, elements of a line
constexpr int kMostRows = kLanes == 16 ? 16 : 4;   // their sums fill half of the registers
constexpr int kMostLines = 4;                      // taken side by side when there are few rows
constexpr int64_t kLine = 32;                      // elements
constexpr int64_t kStepSlots = 256;                // scores of a step stay in the L1 cache
constexpr int64_t kStepStride = kStepSlots + 16;   // rows a power of two apart would share cache sets
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Even and odd ones of 2 kLanes elements.
inline void widen(const float* line, Floats& even, Floats& odd) {
#if defined(__AVX512F__)
    const __m512 low(load(line)), high(load(line + kLanes));
    const __m512i places = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    even = Floats(_mm512_permutex2var_ps(low, places, high));
    odd = Floats(_mm512_permutex2var_ps(low, _mm512_add_epi32(places, _mm512_set1_epi32(1)), high));
#else
    // Two of each half of both; the middle quarters change places.
    const __m256 low(load(line)), high(load(line + kLanes));
    const auto in_order = [](__m256 pairs) {
        return Floats(_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(pairs), 0b11011000)));
    };
    even = in_order(_mm256_shuffle_ps(low, high, 0b10001000));
    odd = in_order(_mm256_shuffle_ps(low, high, 0b11011101));
#endif
}

// bfloat16 bits.
inline void widen(const uint16_t* line, Floats& even, Floats& odd) {
    Ints pairs;
    std::memcpy(&pairs, line, sizeof pairs);
    even = floats_of_bits(pairs << 16);
    odd = floats_of_bits(pairs & static_cast<int32_t>(0xffff0000));
}

// Bytes are left where they are in a pair, which saves shifts: even ones come out times 2^24, odd ones times 2^8. What
// odd ones are multiplied with is kOddFactor times larger, and every sum is multiplied by kUnit in the end.
inline void widen(const int8_t* line, Floats& even, Floats& odd) {
    Shorts pairs;
    std::memcpy(&pairs, line, sizeof pairs);
    const Ints wide = __builtin_convertvector(pairs, Ints);
    even = __builtin_convertvector(wide << 24, Floats);
    odd = __builtin_convertvector(wide & ~255, Floats);
}

template <typename Element>
constexpr bool kScaled = std::is_same_v<Element, int8_t>;
template <typename Element>
constexpr float kOddFactor = kScaled<Element> ? 65536.0f : 1.0f;
template <typename Element>
constexpr float kUnit = kScaled<Element> ? 1.0f / 16777216.0f : 1.0f;

// To the L2 cache: it takes more requests at a time than L1, and a few lines ahead would crowd that.
inline void prefetch(const void* line) {
    _mm_prefetch(line, _MM_HINT_T1);
}

template <typename Element>
inline void prefetch_line(const Element* line) {
    prefetch(line);
    if constexpr (sizeof(Element) == 4) prefetch(line + kLine / 2);
}

// Adds weight[row * stride] * line to the sums of each row; used with the even or the odd elements of a line.
template <int kRows>
inline void add_product(const float* weight, int64_t stride, Floats line, Floats (&sums)[kRows][kParts], int part) {
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) sums[row][part] += weight[row * stride] * line;
}

// scores[row][16 i + s] = query row . key slot s of half-block i. query: [padded_dim][kRows].
template <int kRows, int kLines, typename Element>
void multiply_keys(const float* query, int64_t padded_dim, const Element* const* keys, const Element* const* ahead,
                   float* scores) {
    Floats sums[kLines][kRows][kParts] = {};
    for (int64_t pair = 0; pair < padded_dim / 2; ++pair) {
        const float* even_dim = query + 2 * pair * kRows;
#pragma GCC unroll 4
        for (int i = 0; i < kLines; ++i) {
            prefetch_line(ahead[i] + pair * kLine);
#pragma GCC unroll 2
            for (int part = 0; part < kParts; ++part) {
                Floats even, odd;
                widen(keys[i] + pair * kLine + part * 2 * kLanes, even, odd);
                add_product<kRows>(even_dim, 1, even, sums[i], part);
                add_product<kRows>(even_dim + kRows, 1, odd, sums[i], part);
            }
        }
    }
    for (int i = 0; i < kLines; ++i) {
        for (int row = 0; row < kRows; ++row) {
            for (int part = 0; part < kParts; ++part) {
                store(scores + row * kStepStride + i * kHalfSlots + part * kLanes, sums[i][row][part]);
            }
        }
    }
}

// context[row][16 i + d] += sum of weight[row][s] * dim d of slot s in dim group i, over the first slots of a block.
template <int kRows, int kLines, typename Element>
void multiply_values(const float* weight, int64_t slots, const Element* values, const Element* ahead, float* context,
                     int64_t padded_dim) {
    constexpr int64_t kGroup = kHalfSlots * kLine;
    Floats sums[kLines][kRows][kParts];
    const auto place = [&](int i, int row, int part) { return context + row * padded_dim + i * 16 + part * kLanes; };
    for (int i = 0; i < kLines; ++i) {
        for (int row = 0; row < kRows; ++row) {
            for (int part = 0; part < kParts; ++part) sums[i][row][part] = load(place(i, row, part));
        }
    }
    const auto add = [&](int64_t slot, auto slots_of_line) {
#pragma GCC unroll 4
        for (int i = 0; i < kLines; ++i) {
            const int64_t line = i * kGroup + slot / 2 * kLine;
            prefetch_line(ahead + line);
#pragma GCC unroll 2
            for (int part = 0; part < kParts; ++part) {
                Floats even, odd;
                widen(values + line + part * 2 * kLanes, even, odd);
                add_product<kRows>(weight + slot, kStepStride, even, sums[i], part);
                if constexpr (slots_of_line() == 2) {
                    add_product<kRows>(weight + slot + 1, kStepStride, odd, sums[i], part);
                }
            }
        }
    };
    for (int64_t slot = 0; slot + 2 <= slots; slot += 2) add(slot, std::integral_constant<int, 2>());
    // The partner of a last single slot may hold anything: it stays out of every sum.
    if (slots % 2 != 0) add(slots - 1, std::integral_constant<int, 1>());
    for (int i = 0; i < kLines; ++i) {
        for (int row = 0; row < kRows; ++row) {
            for (int part = 0; part < kParts; ++part) store(place(i, row, part), sums[i][row][part]);
        }
    }
}

// Calls work(std::integral_constant<int, n>(), first) for groups of n = kRows, kRows / 2, .. 1 rows of [first, rows).
template <int kRows = kMostRows, typename Work>
inline void split_rows(int64_t first, int64_t rows, const Work& work) {
    for (; first + kRows <= rows; first += kRows) work(std::integral_constant<int, kRows>(), first);
    if constexpr (kRows > 1) split_rows<kRows / 2>(first, rows, work);
}

// Calls work(std::integral_constant<int, n>(), first) for n = kLines, then 1 of [0, lines).
template <int kLines, typename Work>
inline void split_lines(int64_t lines, const Work& work) {
    int64_t first = 0;
    for (; first + kLines <= lines; first += kLines) work(std::integral_constant<int, kLines>(), first);
    for (; first < lines; ++first) work(std::integral_constant<int, 1>(), first);
}

template <int kRows>
constexpr int kLinesOf = std::min(kMostLines, kMostRows / kRows);

// One tile. A step is the slots [begin, begin + slots); weight [rows][kStepStride] holds its scores, then its p.
template <typename Element>
class TileRun {
public:
    // query: room for [rows, padded_dim].
    TileRun(const AttentionTile& tile, float* query)
        : tile_(tile),
          dim_(tile.layout.padded_dim()),
          end_(std::min(tile.end, *std::max_element(tile.visible, tile.visible + tile.rows))),
          query_(query) {
        std::fill(tile.context, tile.context + tile.rows * dim_, 0.0f);
        std::fill(tile.max, tile.max + tile.rows, -kInfinity);
        std::fill(tile.sum, tile.sum + tile.rows, 0.0f);
        split_rows(0, tile.rows, [&](auto count, int64_t first) {
            const float* from = tile.query + first * dim_;
            float* to = query + first * dim_;
            for (int64_t i = 0; i < dim_ * count; ++i) {
                const int64_t d = i / count;
                to[i] = from[i % count * dim_ + d] * (d % 2 == 0 ? 1.0f : kOddFactor<Element>);
            }
        });
    }

    void run() {
        for (int64_t begin = tile_.begin; begin < end_; begin += kStepSlots) {
            const int64_t slots = std::min(kStepSlots, end_ - begin);
            compute_scores(begin, slots);
            for (int64_t row = 0; row < tile_.rows; ++row) update_softmax(row, begin, slots);
            accumulate_values(begin, slots);
        }
        for (int64_t i = 0; i < tile_.rows * dim_; ++i) tile_.context[i] *= kUnit<Element>;
    }

private:
    // Of the block of a slot: the half of a part where the slot's keys are, or half of the dims of its values.
    const Element* half(int64_t slot, int64_t part_offset) const {
        const auto* part = reinterpret_cast<const Element*>(tile_.blocks[slot / kBlockSlots] + part_offset);
        return part + slot % kBlockSlots / kHalfSlots * kHalfSlots * dim_;
    }

    // What is read kAheadSlots after slot `at` of a step: keys of the step, then its values, then the next step's keys.
    const Element* ahead(int64_t begin, int64_t slots, int64_t at) const {
        const int64_t whole = round_up(slots, kBlockSlots), next = at + kAheadSlots;
        if (next < whole) return half(begin + next, 0);
        if (next < 2 * whole) return half(begin + next - whole, tile_.layout.value_offset());
        const int64_t later = begin + next - whole;
        return half(later < tile_.ahead_end ? later : begin, 0);
    }

    const float* scales(int64_t slot, int64_t part_offset) const {
        const uint8_t* part = tile_.blocks[slot / kBlockSlots] + part_offset;
        return reinterpret_cast<const float*>(part) + slot % kBlockSlots;
    }

    void compute_scores(int64_t begin, int64_t slots) {
        for (int64_t at = 0; at < slots; at += kMostLines * kHalfSlots) {
            const Element *keys[kMostLines], *next[kMostLines];
            const int64_t halves = std::min<int64_t>(kMostLines, (slots - at + kHalfSlots - 1) / kHalfSlots);
            for (int64_t i = 0; i < halves; ++i) {
                const int64_t slot = begin + at + i * kHalfSlots;
                keys[i] = half(slot, 0);
                next[i] = ahead(begin, slots, at + i * kHalfSlots);
                if constexpr (kScaled<Element>) {
                    prefetch(scales(slot, tile_.layout.key_scale_offset()));
                    prefetch(scales(slot, tile_.layout.value_scale_offset()));
                }
            }
            split_rows(0, tile_.rows, [&](auto rows, int64_t row) {
                split_lines<kLinesOf<rows()>>(halves, [&](auto lines, int64_t i) {
                    float* scores = weight_ + row * kStepStride + at + i * kHalfSlots;
                    multiply_keys<rows(), lines()>(query_ + row * dim_, dim_, keys + i, next + i, scores);
                });
            });
        }
    }

    // Scores of a row to p (int8: times the scale of the value), with the context and the sum of earlier steps brought
    // to the new maximum. Scores that the row does not see may be NaN: selection makes them -infinity, and their p 0.
    void update_softmax(int64_t row, int64_t begin, int64_t slots) {
        float* weight = weight_ + row * kStepStride;
        const int64_t seen = std::clamp<int64_t>(tile_.visible[row] - begin, 0, slots);
        std::fill(weight + seen, weight + slots, 0.0f);
        if (seen == 0) return;
        Floats largest = broadcast(-kInfinity);
        for (int64_t at = 0; at < seen; at += kLanes) {
            Floats score = load(weight + at);
            if constexpr (kScaled<Element>) {
                score *= load(scales(begin + at, tile_.layout.key_scale_offset())) * kUnit<Element>;
            }
            score = first_lanes(seen - at) ? score : broadcast(-kInfinity);
            store(weight + at, score);
            largest = max_of(score, largest);
        }
        const float max = std::max(largest_of(largest), tile_.max[row]);
        Floats sum{}, odd_factors;
        for (int i = 0; i < kLanes; ++i) odd_factors[i] = i % 2 == 0 ? 1.0f : kOddFactor<Element>;
        for (int64_t at = 0; at < seen; at += kLanes) {
            Floats p = exp_of(load(weight + at) - max);
            sum += p;
            if constexpr (kScaled<Element>) {
                p *= load(scales(begin + at, tile_.layout.value_scale_offset())) * odd_factors;
            }
            store(weight + at, p);
        }
        const Floats factor = exp_of(broadcast(tile_.max[row] - max));
        float* context = tile_.context + row * dim_;
        for (int64_t d = 0; d < dim_; d += kLanes) store(context + d, load(context + d) * factor);
        tile_.sum[row] = tile_.sum[row] * factor[0] + sum_of(sum);
        tile_.max[row] = max;
    }

    void accumulate_values(int64_t begin, int64_t slots) {
        for (int64_t at = 0; at < slots; at += kBlockSlots) {
            const Element* values = half(begin + at, tile_.layout.value_offset());
            const Element* next = ahead(begin, slots, round_up(slots, kBlockSlots) + at);
            const int64_t count = std::min(kBlockSlots, slots - at);
            split_rows(0, tile_.rows, [&](auto rows, int64_t row) {
                split_lines<kLinesOf<rows()>>(dim_ / 16, [&](auto lines, int64_t group) {
                    const int64_t from = group * kHalfSlots * kLine;
                    multiply_values<rows(), lines()>(weight_ + row * kStepStride + at, count, values + from,
                                                     next + from, tile_.context + row * dim_ + group * 16, dim_);
                });
            });
        }
    }

    static constexpr int64_t kAheadSlots = kMostLines * kHalfSlots;

    const AttentionTile& tile_;
    const int64_t dim_;
    const int64_t end_;  // behind it no row sees anything
    float* query_;       // groups of n rows as in split_rows, each [padded_dim][n]
    alignas(64) float weight_[kTileRows * kStepStride];
};

// Elements of one token, and the scale that int8 ones are multiplied by. Columns are padded with zeros to a multiple of
// the lanes.
inline float encode(const float* x, int64_t count, float* elements) {
    std::copy(x, x + count, elements);
    return 1.0f;
}

inline float encode(const float* x, int64_t count, uint16_t* elements) {
    for (int64_t i = 0; i < count; i += kLanes) {
        const Floats value = load(x + i);
        const Bits bits = Bits(bits_of(value));  // sums wrap around
        const Bits rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        const Shorts narrow = __builtin_convertvector(value == value ? rounded : bits >> 16 | 0x40, Shorts);
        std::memcpy(elements + i, &narrow, sizeof narrow);
    }
    return 1.0f;
}

// What is not finite makes the scale NaN, and so all that the token adds to.
inline float encode(const float* x, int64_t count, int8_t* elements) {
    Floats largest{}, not_a_number{};
    for (int64_t i = 0; i < count; i += kLanes) {
        const Floats value = load(x + i);
        largest = max_of(absolute(value), largest);
        not_a_number += value * 0.0f;
    }
    const float scale = largest_of(largest) / 127.0f + sum_of(not_a_number);
    if (!(scale > 0.0f)) {
        std::fill(elements, elements + count, int8_t{0});
        return scale;
    }
    for (int64_t i = 0; i < count; i += kLanes) {
        // Quotients of subnormal numbers can exceed 127.
        const Floats quotient = max_of(min_of(load(x + i) / scale, broadcast(127.0f)), broadcast(-127.0f));
        const Ints whole = bits_of(quotient + kRoundingShift);
        for (int lane = 0; lane < kLanes; ++lane) elements[i + lane] = static_cast<int8_t>(whole[lane]);
    }
    return scale;
}

// Keys and values of one token to their places in the block: pairs of dims, and single dims, one line apart.
template <typename Element>
void append_token(const CacheLayout& layout, uint8_t* block, int64_t slot, const float* key, const float* value) {
    static thread_local Scratch padded_memory, element_memory;
    const int64_t dim = layout.padded_dim();
    float* padded = padded_memory.get<float>(dim);
    Element* elements = element_memory.get<Element>(dim);
    const auto encode_padded = [&](const float* x, int64_t scale_offset) {
        std::copy(x, x + layout.head_dim, padded);
        std::fill(padded + layout.head_dim, padded + dim, 0.0f);
        const float scale = encode(padded, dim, elements);
        if constexpr (std::is_same_v<Element, int8_t>) std::memcpy(block + scale_offset + slot * 4, &scale, 4);
    };
    encode_padded(key, layout.key_scale_offset());
    auto* keys = reinterpret_cast<Element*>(block) + layout.key_index(slot, 0);
    for (int64_t d = 0; d < dim; d += 2) std::copy(elements + d, elements + d + 2, keys + d / 2 * kLine);
    encode_padded(value, layout.value_scale_offset());
    auto* values = reinterpret_cast<Element*>(block + layout.value_offset());
    for (int64_t group = 0; group < dim; group += 16) {
        Element* line = values + layout.value_index(slot, group);
        for (int64_t d = 0; d < 16; ++d) line[2 * d] = elements[group + d];
    }
}

// Calls work(element), an element of the layout's type.
template <typename Work>
inline void with_element(const CacheLayout& layout, const Work& work) {
    switch (layout.type) {
        case CacheType::f32: return work(float{});
        case CacheType::bf16: return work(uint16_t{});
        case CacheType::int8: return work(int8_t{});
    }
}

inline void append(const CacheLayout& layout, uint8_t* block, int64_t slot, const float* key, const float* value) {
    with_element(layout,
                 [&](auto element) { append_token<decltype(element)>(layout, block, slot, key, value); });
}

inline void attend(const AttentionTile& tile) {
    static thread_local Scratch scratch;
    float* query = scratch.get<float>(tile.rows * tile.layout.padded_dim());
    with_element(tile.layout, [&](auto element) { TileRun<decltype(element)>(tile, query).run(); });
}

// Two partial softmaxes to one; a side that saw nothing has sum = 0 and changes nothing. One that saw nothing but NaN
// has max = -infinity as well, and its sum and context are NaN.
inline void merge(int64_t dim, const float* context, float max, float sum, float* into_context, float* into_max,
                  float* into_sum) {
    if (sum == 0.0f) return;
    const float top = std::max(max, *into_max);
    const float factor = exp_of(broadcast(max - top))[0], into_factor = exp_of(broadcast(*into_max - top))[0];
    for (int64_t d = 0; d < dim; ++d) into_context[d] = into_context[d] * into_factor + context[d] * factor;
    *into_sum = *into_sum * into_factor + sum * factor;
    *into_max = top;
}

}  // namespace
}  // namespace chatglm
