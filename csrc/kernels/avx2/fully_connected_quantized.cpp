// FullyConnected for int8 and int4 weights without VNNI: codes widened to 16 bits times the 16-bit integers of x.
//
// vpmaddwd adds two neighbours of K into an int32 sum. The products are as large as 255 * 32639 a column; sums of
// code - zero_point stay below 2^31: 512 * 128 * 32639 (int8), 128 * 255 * 32639 (int4). Sums of bare codes may wrap
// around on the way, which the exact difference undoes.
//
// Few rows: codes are widened in registers, one panel at a time, so that a thread reads one stream. More rows: the
// codes of one panel and block are widened once, into the first-level cache, where all rows find them.
#include <immintrin.h>

#include "kernels/avx2/fully_connected.h"
#include "kernels/epilogue-inl.h"
#include "kernels/fully_connected-inl.h"
#include "kernels/memory.h"

namespace chatglm::avx2 {
namespace {

constexpr int64_t kWidenRows = 4;  // from so many rows on
constexpr int kTileRows = 4;
constexpr int kQuarters = 4;  // 16 bytes of a line, 4 columns of 4 channels, fill a vector in 16 bits

// What `prepare` makes of x, for R rows and B blocks:
//   codes   int16 [block][R][columns of the block]
//   scales  float [B][R]
//   totals  int32 [group][R]: sum of the codes over a group
struct Prepared {
    int64_t rows, blocks, group, bytes;  // `group` in columns; the last one of int8 may be shorter
    int16_t* codes;
    float* scales;
    int32_t* totals;

    Prepared(const void* prepared, const PackedLayout& layout, int64_t rows)
        : rows(rows),
          blocks(activation_blocks(layout)),
          group(layout.format == WeightFormat::int4 ? layout.group_size : kActivationBlock) {
        const int64_t count = layout.padded_in() * rows, groups = (layout.padded_in() + group - 1) / group;
        bytes = count * 2 + (blocks + groups) * rows * 4;
        codes = static_cast<int16_t*>(const_cast<void*>(prepared));
        scales = reinterpret_cast<float*>(codes + count);
        totals = reinterpret_cast<int32_t*>(scales + blocks * rows);
    }

    int16_t* block_codes(int64_t block, int64_t row, int64_t columns) const {
        return codes + block * kActivationBlock * rows + row * columns;
    }
};

int64_t prepared_bytes(const PackedLayout& layout, int64_t rows, int) {
    return Prepared(nullptr, layout, rows).bytes;
}

void prepare(const PackedLayout& layout, int64_t rows, int activation_bits, const float* x, int64_t x_stride,
             int64_t begin, int64_t end, void* prepared) {
    const Prepared out(prepared, layout, rows);
    for (int64_t block = 0; block < out.blocks; ++block) {
        const int64_t start = block * kActivationBlock, columns = block_columns(layout, block);
        const int64_t count = std::min(columns, layout.in_features - start);
        for (int64_t row = begin; row < end; ++row) {
            int16_t* q = out.block_codes(block, row, columns);
            out.scales[block * rows + row] =
                quantize_block(x + row * x_stride + start, count, columns, activation_bits, q);
            for (int64_t k = 0; k < columns; k += out.group) {
                out.totals[(start + k) / out.group * rows + row] = sum_codes(q + k, std::min(out.group, columns - k));
            }
        }
    }
}

// Sums that may wrap around. GCC 12 copies the sums of a loop once more when they are __m256i.
typedef uint32_t Sums __attribute__((vector_size(32)));

// One panel of a packed weight.
struct Panel {
    const uint8_t* codes;
    const uint16_t* scales = nullptr;      // int4: float16 [group][16]
    const uint8_t* zero_points = nullptr;  // int4: [group][16]

    Panel(const FullyConnectedTask& task, int64_t panel) : codes(task.layout.panel(task.weight, panel)) {
        if (task.layout.format != WeightFormat::int4) return;
        scales = task.layout.group_scales(task.weight, panel);
        zero_points = task.layout.zero_points(task.weight, panel);
    }
};

// Of 16 channels in one group of columns.
struct Group {
    __m256i zero_points[kHalves];
    Floats scales[kHalves];
};

struct Int8 {
    static constexpr int kStep = 4;  // columns of a line of 64 bytes

    // Columns 4 part..4 part + 3 of four channels of a line.
    static __m256i codes(const uint8_t* line, int, int quarter) {
        return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(line) + quarter));
    }
    // The scale of a channel is for the epilogue.
    static Group group(const Panel&, int64_t) {
        const __m256i middle = _mm256_set1_epi32(128);
        return {{middle, middle}, {broadcast(1.0f), broadcast(1.0f)}};
    }
};

struct Int4 {
    static constexpr int kStep = 8;

    static __m256i codes(const uint8_t* line, int part, int quarter) {
        const __m256i both = Int8::codes(line, 0, quarter);
        return part ? _mm256_srli_epi16(both, 4) : _mm256_and_si256(both, _mm256_set1_epi16(15));
    }
    static Group group(const Panel& panel, int64_t index) {
        const auto* zeros = reinterpret_cast<const __m128i*>(panel.zero_points) + index;
        const auto* halves = reinterpret_cast<const __m128i*>(panel.scales) + index * 2;
        const __m128i bytes = _mm_loadu_si128(zeros);
        return {{_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))},
                {Floats(_mm256_cvtph_ps(_mm_loadu_si128(halves))),
                 Floats(_mm256_cvtph_ps(_mm_loadu_si128(halves + 1)))}};
    }
};

// sums + sum * scales * activation_scale.
inline Floats add_scaled(Sums sum, Floats scales, float activation_scale, Floats sums) {
    return multiply_add(Floats(_mm256_cvtepi32_ps(__m256i(sum))), scales * broadcast(activation_scale), sums);
}

// The sums of 8 channels from two vectors of (channel, half of the columns).
inline Sums sums_of_channels(Sums low, Sums high) {
    return Sums(_mm256_permute4x64_epi64(_mm256_hadd_epi32(__m256i(low), __m256i(high)), 0xd8));
}

inline Sums multiply_words(__m256i codes, __m256i x, Sums sum) {
    return sum + Sums(_mm256_madd_epi16(codes, x));
}

// Sums of bare codes of one panel times x over `columns` columns, one row; the line behind them.
template <typename Format>
inline const uint8_t* multiply_lines(const uint8_t* line, const int16_t* x, int64_t columns, Sums* channels) {
    Sums sums[kQuarters] = {};
    for (int64_t k = 0; k < columns; k += Format::kStep, line += kLineBytes) {
        _mm_prefetch(line + kPrefetchBytes, _MM_HINT_T0);
#pragma GCC unroll 2
        for (int part = 0; part < Format::kStep / 4; ++part) {
            int64_t four;
            std::memcpy(&four, x + k + 4 * part, 8);
#pragma GCC unroll 4
            for (int i = 0; i < kQuarters; ++i) {
                sums[i] = multiply_words(Format::codes(line, part, i), _mm256_set1_epi64x(four), sums[i]);
            }
        }
    }
    channels[0] = sums_of_channels(sums[0], sums[1]);
    channels[1] = sums_of_channels(sums[2], sums[3]);
    return line;
}

// Sums of one panel and one row.
template <typename Format>
void multiply_row(const PackedLayout& layout, const Panel& panel, const Prepared& x, int64_t row, float* out) {
    const uint8_t* line = panel.codes;
    Floats sums[kHalves] = {};
    int64_t index = 0;
    for (int64_t block = 0; block < x.blocks; ++block) {
        const int64_t columns = block_columns(layout, block);
        const int16_t* codes = x.block_codes(block, row, columns);
        for (int64_t k = 0; k < columns; k += x.group, ++index) {
            Sums channels[kHalves];
            line = multiply_lines<Format>(line, codes + k, std::min(x.group, columns - k), channels);
            const Group group = Format::group(panel, index);
            const auto total = static_cast<uint32_t>(x.totals[index * x.rows + row]);
            for (int h = 0; h < kHalves; ++h) {
                const Sums exact = channels[h] - Sums(group.zero_points[h]) * total;
                sums[h] = add_scaled(exact, group.scales[h], x.scales[block * x.rows + row], sums[h]);
            }
        }
    }
    for (int h = 0; h < kHalves; ++h) store(out + h * kLanes, sums[h]);
}

// One block of K of a panel: code - zero_point as int16 [columns / 2][16][2], and the scales of its groups.
struct WideBlock {
    alignas(64) int16_t codes[kActivationBlock * kPanel];
    Floats scales[kActivationBlock / 32][kHalves];
};

// Widens the lines of a group into `out`.
template <typename Format>
void widen_group(const uint8_t* line, int64_t columns, const Group& group, int16_t* out) {
    auto* to = reinterpret_cast<__m256i*>(out);
    __m256i zero_points[kHalves];
    for (int h = 0; h < kHalves; ++h) {
        zero_points[h] = _mm256_or_si256(group.zero_points[h], _mm256_slli_epi32(group.zero_points[h], 16));
    }
    for (int64_t k = 0; k < columns; k += Format::kStep, line += kLineBytes) {
        _mm_prefetch(line + kPrefetchBytes, _MM_HINT_T0);
        for (int part = 0; part < Format::kStep / 4; ++part, to += 2 * kHalves) {
            for (int h = 0; h < kHalves; ++h) {
                const __m256 low = _mm256_castsi256_ps(Format::codes(line, part, 2 * h));
                const __m256 high = _mm256_castsi256_ps(Format::codes(line, part, 2 * h + 1));
                const __m256i first = _mm256_castps_si256(_mm256_shuffle_ps(low, high, 0x88));
                const __m256i second = _mm256_castps_si256(_mm256_shuffle_ps(low, high, 0xdd));
                to[h] = _mm256_sub_epi16(_mm256_permute4x64_epi64(first, 0xd8), zero_points[h]);
                to[kHalves + h] = _mm256_sub_epi16(_mm256_permute4x64_epi64(second, 0xd8), zero_points[h]);
            }
        }
    }
}

// Widens the columns from `start` on.
template <typename Format>
void widen_block(const Panel& panel, int64_t start, int64_t columns, int64_t group_columns, WideBlock& out) {
    const uint8_t* lines = panel.codes + start / Format::kStep * kLineBytes;
    for (int64_t k = 0, g = 0; k < columns; k += group_columns, ++g) {
        const Group group = Format::group(panel, (start + k) / group_columns);
        for (int h = 0; h < kHalves; ++h) out.scales[g][h] = group.scales[h];
        widen_group<Format>(lines + k / Format::kStep * kLineBytes, std::min(group_columns, columns - k), group,
                            out.codes + k * kPanel);
    }
}

// Some rows of one block of K.
struct RowsOfBlock {
    int64_t columns, group;
    const int16_t* codes;  // [rows, columns]
    const float* scales;   // [rows]
    float* sums;           // [rows][16], rows `stride` floats apart
    int64_t stride;
};

template <int kRows>
[[gnu::noinline]] void multiply_tile(const WideBlock& weight, const RowsOfBlock& x) {
    const auto* line = reinterpret_cast<const __m256i*>(weight.codes);
    int64_t k = 0, g = 0;
    do {
        const int64_t end = std::min(k + x.group, x.columns);
        Sums sums[kRows][kHalves] = {};
        do {
            _mm_prefetch(x.codes + kRows * (x.columns + k), _MM_HINT_T0);  // for the tile of the next rows
            const __m256i codes[kHalves] = {line[0], line[1]};
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) {
                int32_t two;
                std::memcpy(&two, x.codes + r * x.columns + k, 4);
#pragma GCC unroll 2
                for (int h = 0; h < kHalves; ++h) {
                    sums[r][h] = multiply_words(codes[h], _mm256_set1_epi32(two), sums[r][h]);
                }
            }
            line += kHalves;
            k += 2;
        } while (k < end);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
            for (int h = 0; h < kHalves; ++h) {
                float* at = x.sums + r * x.stride + h * kLanes;
                store(at, add_scaled(sums[r][h], weight.scales[g][h], x.scales[r], load(at)));
            }
        }
        ++g;
    } while (k < x.columns);
}

// Sums of the panels [begin, end), all rows.
template <typename Format>
void multiply_rows(const FullyConnectedTask& task, const Prepared& x, int64_t begin, int64_t end, float* sums,
                   int64_t stride) {
    static thread_local Scratch scratch;
    WideBlock& weight = *scratch.get<WideBlock>(1);
    std::fill_n(sums, x.rows * stride, 0.0f);
    for (int64_t block = 0; block < x.blocks; ++block) {
        const int64_t columns = block_columns(task.layout, block);
        for (int64_t panel = begin; panel < end; ++panel) {
            widen_block<Format>(Panel(task, panel), block * kActivationBlock, columns, x.group, weight);
            for (int64_t row = 0; row < x.rows; row += kTileRows) {
                const RowsOfBlock part{columns,
                                       x.group,
                                       x.block_codes(block, row, columns),
                                       x.scales + block * x.rows + row,
                                       sums + row * stride + (panel - begin) * kPanel,
                                       stride};
                with_rows<kTileRows>(x.rows - row, [&](auto rows) { multiply_tile<rows>(weight, part); });
            }
        }
    }
}

template <typename Format>
void multiply(const FullyConnectedTask& task, int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    const Prepared x(task.prepared, task.layout, task.rows);
    for (int64_t first = begin; first < end; first += kPanelsAtATime) {
        const int64_t last = std::min(first + kPanelsAtATime, end), stride = (last - first) * kPanel;
        float* sums = scratch.get<float>(task.rows * stride);
        if (task.rows >= kWidenRows) {
            multiply_rows<Format>(task, x, first, last, sums, stride);
        } else {
            for (int64_t panel = first; panel < last; ++panel) {
                float* out = sums + (panel - first) * kPanel;
                for (int64_t r = 0; r < task.rows; ++r) {
                    multiply_row<Format>(task.layout, Panel(task, panel), x, r, out + r * stride);
                }
            }
        }
        finish(task, first, last, {sums, stride, 2 * kPanel});
    }
}

}  // namespace

FullyConnectedKernel fully_connected_int8() {
    return {prepared_bytes, prepare, multiply<Int8>};
}

FullyConnectedKernel fully_connected_int4() {
    return {prepared_bytes, prepare, multiply<Int4>};
}

}  // namespace chatglm::avx2
