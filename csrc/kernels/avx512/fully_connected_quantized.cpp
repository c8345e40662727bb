// FullyConnected for int8 and int4 weights: unsigned codes in registers times signed bytes of x from memory (VNNI).
//
// A tile is a few rows by 1, 2 or 4 panels by the planes of x (high and low byte with 16-bit activations), one int32
// accumulator each. A tile walks over one block of K; its rows are packed so that one pointer serves them all. With few
// rows several panels side by side keep as many streams from memory; with many, the codes of two panels stay in the
// first-level cache while all rows pass.
#include <immintrin.h>

#include "kernels/avx512/fully_connected.h"
#include "kernels/epilogue-inl.h"
#include "kernels/fully_connected-inl.h"
#include "kernels/memory.h"

namespace chatglm {
namespace {

// Accumulators of the largest tile, a register each, of 32.
constexpr int kAccumulators = 24;
// Conversions under this mask are the plain instructions; GCC 12 warns of its own header's form without one.
constexpr __mmask16 kAll = 0xffff;
constexpr __mmask32 kAllBytes = 0xffffffff;

// How far ahead weights are prefetched into the second-level cache, and from how many operations a line on: the
// processor's own prefetcher does not run ahead of a loop that fills its queues with what waits for each line. Fewer
// lose by it, as these requests hold miss buffers of the first level too. Measured: int4 with 16-bit activations, or
// with two rows and more, gains; int4 with one row of 8-bit activations and int8 lose.
constexpr int64_t kFarBytes = 2560;
constexpr int kFarOperations = 6;

// Panels side by side where the rows are few.
constexpr int kFewRowsPanels = 4;

// Rows of a full tile: all registers with two panels, the half of them for the few rows that more panels are for.
constexpr int tile_rows(int planes, int panels = 2) {
    return (panels == kFewRowsPanels ? 4 : kAccumulators / 2) / planes;
}

// What `prepare` makes of x, for R rows and B blocks. Sections, each from a multiple of 64 bytes on:
//   codes        int8 [block][tile of rows][K / 4][row of the tile][plane][4]
//   scales       float [B][R]
//   corrections  int32 [group][R][plane]: sums of the plane's codes over a group. int8, where a group is a block:
//                times -128, as the unsigned codes are too large by 128. int4: negative, for the zero point.
struct Prepared {
    int64_t rows, planes, blocks, bytes;
    int8_t* codes;
    float* scales;
    int32_t* corrections;

    Prepared(const void* prepared, const PackedLayout& layout, int64_t rows, int activation_bits)
        : rows(rows), planes(activation_bits / 8), blocks(activation_blocks(layout)) {
        const int64_t groups = layout.format == WeightFormat::int4 ? layout.groups() : blocks;
        const int64_t code_bytes = layout.padded_in() * rows * planes;
        const int64_t scale_bytes = round_up(blocks * rows * 4, kLineBytes);
        bytes = code_bytes + scale_bytes + groups * rows * planes * 4;
        codes = static_cast<int8_t*>(const_cast<void*>(prepared));
        scales = reinterpret_cast<float*>(codes + code_bytes);
        corrections = reinterpret_cast<int32_t*>(codes + code_bytes + scale_bytes);
    }

    // Codes of the rows from `row`, the first of a tile, in a block of that many columns.
    int8_t* tile(int64_t block, int64_t row, int64_t columns) const {
        return codes + (block * kActivationBlock * rows + row * columns) * planes;
    }
    float& scale(int64_t block, int64_t row) const { return scales[block * rows + row]; }
    int32_t* correction(int64_t group, int64_t row) const { return corrections + (group * rows + row) * planes; }
};

int64_t prepared_bytes(const PackedLayout& layout, int64_t rows, int activation_bits) {
    return Prepared(nullptr, layout, rows, activation_bits).bytes;
}

// The high bytes of 4 columns before their low bytes, eight times; without a second plane the low bytes only.
template <int kPlanes>
__m512i in_words(__m512i columns) {
    const __m256i low = _mm512_maskz_cvtepi16_epi8(kAllBytes, columns);
    if constexpr (kPlanes == 1) return _mm512_castsi256_si512(low);
    const __m512i rest = _mm512_sub_epi16(columns, _mm512_cvtepi8_epi16(low));
    const __m256i high = _mm512_maskz_cvtepi16_epi8(kAllBytes, _mm512_srai_epi16(rest, 8));
    const __m512i order = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    return _mm512_permutex2var_epi32(_mm512_castsi256_si512(high), order, _mm512_castsi256_si512(low));
}

// One row of one block into its places: `out` at the row, `stride` bytes between its groups of 4 columns.
template <int kPlanes>
void pack_row(const int16_t* q, int64_t columns, int8_t* out, int64_t stride) {
    constexpr int64_t kColumns = 32, kWord = kPlanes * 4;
    alignas(kLineBytes) int8_t words[kLineBytes];
    for (int64_t k = 0; k < columns; k += kColumns) {
        _mm512_store_si512(words, in_words<kPlanes>(_mm512_loadu_si512(q + k)));
        for (int64_t i = 0; i < kColumns / 4; ++i, out += stride) std::memcpy(out, words + i * kWord, kWord);
    }
}

template <int kPlanes>
void sum_group(const int16_t* q, int64_t columns, int32_t factor, int32_t* out) {
    int32_t total = 0, low = 0;
    for (int64_t k = 0; k < columns; ++k) {
        total += q[k];
        low += static_cast<int8_t>(q[k]);
    }
    out[kPlanes - 1] = factor * low;
    if constexpr (kPlanes == 2) out[0] = factor * ((total - low) >> 8);
}

template <int kPlanes>
void prepare_planes(const PackedLayout& layout, const Prepared& out, const float* x, int64_t x_stride, int64_t begin,
                    int64_t end) {
    constexpr int kRows = tile_rows(kPlanes);
    const bool int4 = layout.format == WeightFormat::int4;
    alignas(kLineBytes) int16_t q[kActivationBlock];
    for (int64_t row = begin; row < end; ++row) {
        const int64_t first = row / kRows * kRows, in_tile = std::min<int64_t>(kRows, out.rows - first);
        for (int64_t block = 0; block < out.blocks; ++block) {
            const int64_t start = block * kActivationBlock, columns = block_columns(layout, block);
            const int64_t count = std::min(columns, layout.in_features - start);
            out.scale(block, row) = quantize_block(x + row * x_stride + start, count, columns, kPlanes * 8, q);
            pack_row<kPlanes>(q, columns, out.tile(block, first, columns) + (row - first) * kPlanes * 4,
                              in_tile * kPlanes * 4);
            const int64_t group = int4 ? layout.group_size : columns;
            for (int64_t k = 0; k < columns; k += group) {
                const int64_t index = int4 ? (start + k) / group : block;
                sum_group<kPlanes>(q + k, group, int4 ? -1 : -128, out.correction(index, row));
            }
        }
    }
}

void prepare(const PackedLayout& layout, int64_t rows, int activation_bits, const float* x, int64_t x_stride,
             int64_t begin, int64_t end, void* prepared) {
    const Prepared out(prepared, layout, rows, activation_bits);
    if (activation_bits == 16) {
        prepare_planes<2>(layout, out, x, x_stride, begin, end);
    } else {
        prepare_planes<1>(layout, out, x, x_stride, begin, end);
    }
}

__m512i broadcast_bytes(const int8_t* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
}

// The packed weight, from its first panel on.
struct Weight {
    const uint8_t* codes;
    int64_t panel_bytes;
    const uint16_t* scales;      // int4: [panel][group][16]
    const uint8_t* zero_points;  // int4: [panel][group][16]
    int64_t groups, group_columns;

    explicit Weight(const FullyConnectedTask& task)
        : codes(task.weight), panel_bytes(task.layout.panel_bytes()) {
        if (task.layout.format != WeightFormat::int4) return;
        scales = task.layout.group_scales(task.weight, 0);
        zero_points = task.layout.zero_points(task.weight, 0);
        groups = task.layout.groups();
        group_columns = task.layout.group_size;
    }
};

// int8: a line of codes is 4 columns, a group is a block.
struct Int8 {
    static constexpr int kStep = 4;  // columns of a line

    // Of a line, with so many rows and planes of x.
    static constexpr int operations(int products) { return products; }

    static __m512i codes(__m512i line, int) { return line; }
    static int64_t group_columns(const Weight&, int64_t block_columns) { return block_columns; }
    static int64_t first_group(const Weight&, int64_t block) { return block; }

    // What the accumulators of a panel start from, and the factor of the weight beside that of x.
    struct Group {
        static void prefetch(const Weight&, int64_t, int64_t, int) {}
        void load(const Weight&, int64_t, int64_t) {}
        __m512i start(int32_t correction) const { return _mm512_set1_epi32(correction); }
        __m512 scale(float activation) const { return _mm512_set1_ps(activation); }
    };
};

// int4: a line of codes is 8 columns, the first four in the low nibbles.
struct Int4 {
    static constexpr int kStep = 8;

    static constexpr int operations(int products) { return 2 * products + 3; }
    static __m512i codes(__m512i line, int part) {
        return _mm512_and_si512(part ? _mm512_srli_epi16(line, 4) : line, _mm512_set1_epi8(15));
    }
    static int64_t group_columns(const Weight& weight, int64_t) { return weight.group_columns; }
    static int64_t first_group(const Weight& weight, int64_t block) {
        return block * (kActivationBlock / weight.group_columns);
    }

    struct Group {
        __m512i zero_points;
        __m512 scales;

        // Of the scales and zero points of so many panels, which lie side by side, the part that is due when all groups
        // ask for theirs. Few rows pass over them faster than the processor finds these short streams.
        [[gnu::always_inline]] static void prefetch(const Weight& weight, int64_t panel, int64_t group, int panels) {
            const int64_t at = panel * weight.groups * kPanel, step = panels * kPanel;
            const uint16_t* scales = weight.scales + at + group * step;
            for (int64_t i = 0; i < step; i += kLineBytes / 2) _mm_prefetch(scales + i, _MM_HINT_T0);
            _mm_prefetch(weight.zero_points + at + group * step, _MM_HINT_T0);
        }

        void load(const Weight& weight, int64_t panel, int64_t group) {
            const int64_t at = (panel * weight.groups + group) * kPanel;
            const auto* zero = reinterpret_cast<const __m128i*>(weight.zero_points + at);
            const auto* half = reinterpret_cast<const __m256i*>(weight.scales + at);
            zero_points = _mm512_maskz_cvtepu8_epi32(kAll, _mm_loadu_si128(zero));
            scales = _mm512_maskz_cvtph_ps(kAll, _mm256_loadu_si256(half));
        }
        // Both factors fit 16 bits: a sum is at most 128 * 128.
        __m512i start(int32_t correction) const {
            return _mm512_madd_epi16(zero_points, _mm512_set1_epi32(correction & 0xffff));
        }
        __m512 scale(float activation) const { return _mm512_mul_ps(scales, _mm512_set1_ps(activation)); }
    };
};

// One group of columns of a tile: where its parts lie.
struct GroupOfTile {
    int64_t columns;
    int64_t lines_behind;   // of each panel, after the group
    const uint8_t* weight;  // of the first panel
    int64_t panel_bytes;
    const int8_t* codes;
    const int32_t* corrections;  // [row][plane]
    const float* scales;         // [row]
};

// Accumulators of a tile, typed as the instruction has them: GCC 12 copies those of another type at each step.
template <int kRows, int kPanels, int kPlanes>
using TileSums = Ints[kRows][kPlanes][kPanels];

// Prefetches for a line of a panel that is one of `panels` side by side, with so many lines of the panel left: behind
// its end comes the panel that is read after all of these.
[[gnu::always_inline]] inline void prefetch_far(const uint8_t* line, int64_t lines_left, int panels,
                                                int64_t panel_bytes) {
    const bool inside = lines_left > kFarBytes / kLineBytes;
    _mm_prefetch(line + (inside ? kFarBytes : kFarBytes + (panels - 1) * panel_bytes), _MM_HINT_T1);
}

// A line of codes of each panel. Loaded once, whatever is taken out of it: the compiler would load it again for the
// other nibbles.
template <int kOperations, int kPanels>
[[gnu::always_inline]] inline void load_lines(__m512i (&lines)[kPanels], const uint8_t* weight, int64_t panel_bytes,
                                              int64_t lines_left) {
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p) {
        const uint8_t* line = weight + p * panel_bytes;
        lines[p] = _mm512_loadu_si512(line);
        asm volatile("" : "+v"(lines[p]));
        prefetch_near(line);
        if constexpr (kOperations >= kFarOperations && kPanels == kFewRowsPanels) {
            prefetch_far(line, lines_left, kPanels, panel_bytes);
        }
    }
}

// Adds the products of one line of codes of each panel, column group `part` of it.
template <typename Format, int kRows, int kPanels, int kPlanes>
[[gnu::always_inline]] inline void add_products(TileSums<kRows, kPanels, kPlanes>& sums,
                                                const __m512i (&lines)[kPanels], const int8_t* codes, int part) {
    __m512i w[kPanels];
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p) w[p] = Format::codes(lines[p], part);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int l = 0; l < kPlanes; ++l) {
            const __m512i four = broadcast_bytes(codes + ((part * kRows + r) * kPlanes + l) * 4);
#pragma GCC unroll 4
            for (int p = 0; p < kPanels; ++p) {
                sums[r][l][p] = Ints(_mm512_dpbusd_epi32(__m512i(sums[r][l][p]), w[p], four));
            }
        }
    }
}

// Adds the scaled sums of a group to those of the tile, out [row][panel][16].
template <typename Group, int kRows, int kPanels, int kPlanes>
[[gnu::always_inline]] inline void add_scaled(const TileSums<kRows, kPanels, kPlanes>& sums, const Group* factors,
                                              const float* activation_scales, float* out) {
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int p = 0; p < kPanels; ++p, out += kPanel) {
            Floats total = __builtin_convertvector(sums[r][kPlanes - 1][p], Floats);
            if constexpr (kPlanes == 2) {
                total = multiply_add(__builtin_convertvector(sums[r][0][p], Floats), broadcast(256.0f), total);
            }
            store(out, multiply_add(total, Floats(factors[p].scale(activation_scales[r])), load(out)));
        }
    }
}

// Adds the products of one group to the sums [row][panel][16] of a tile.
template <typename Format, int kRows, int kPanels, int kPlanes>
[[gnu::always_inline]] inline void multiply_group(const GroupOfTile& group, const typename Format::Group* factors,
                                                  Ahead& ahead, float* out) {
    TileSums<kRows, kPanels, kPlanes> sums;
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int l = 0; l < kPlanes; ++l) {
#pragma GCC unroll 4
            for (int p = 0; p < kPanels; ++p) {
                sums[r][l][p] = Ints(factors[p].start(group.corrections[r * kPlanes + l]));
            }
        }
    }
    const uint8_t* weight = group.weight;
    const int8_t* codes = group.codes;
    int64_t steps = group.columns / Format::kStep;
    do {
        __m512i lines[kPanels];
        load_lines<Format::operations(kRows * kPlanes)>(lines, weight, group.panel_bytes, steps + group.lines_behind);
        if constexpr (kPanels != kFewRowsPanels) ahead.step<kPanels>();
#pragma GCC unroll 2
        for (int part = 0; part < Format::kStep / 4; ++part) {
            add_products<Format, kRows, kPanels, kPlanes>(sums, lines, codes, part);
        }
        weight += kLineBytes;
        codes += Format::kStep * kRows * kPlanes;
    } while (--steps > 0);
    add_scaled<typename Format::Group, kRows, kPanels, kPlanes>(sums, factors, group.scales, out);
}

// A block of K of a tile.
struct BlockOfTile {
    int64_t block, columns, panel, row;
};

// Adds the products of one block to the sums [row][panel][16] of a tile.
template <typename Format, int kRows, int kPanels, int kPlanes>
[[gnu::noinline]] void multiply_tile(const Weight& weight, const Prepared& x, const BlockOfTile& at, Ahead ahead,
                                     float* sums) {
    const int64_t start = at.block * kActivationBlock;
    GroupOfTile group{Format::group_columns(weight, at.columns),
                      weight.panel_bytes / kLineBytes - start / Format::kStep,
                      weight.codes + at.panel * weight.panel_bytes + start / Format::kStep * kLineBytes,
                      weight.panel_bytes,
                      x.tile(at.block, at.row, at.columns),
                      nullptr,
                      &x.scale(at.block, at.row)};
    int64_t index = Format::first_group(weight, at.block);
    for (int64_t column = 0; column < at.columns; column += group.columns, ++index) {
        typename Format::Group factors[kPanels];
#pragma GCC unroll 4
        for (int p = 0; p < kPanels; ++p) factors[p].load(weight, at.panel + p, index);
        if constexpr (kPanels == kFewRowsPanels) Format::Group::prefetch(weight, at.panel + kPanels, index, kPanels);
        group.corrections = x.correction(index, at.row);
        group.lines_behind -= group.columns / Format::kStep;
        multiply_group<Format, kRows, kPanels, kPlanes>(group, factors, ahead, sums);
        group.weight += group.columns / Format::kStep * kLineBytes;
        group.codes += group.columns * kRows * kPlanes;
    }
}

template <typename Format, int kPanels, int kPlanes>
void multiply_panels(const FullyConnectedTask& task, const Weight& weight, const Prepared& x, int64_t panel) {
    constexpr int kRows = tile_rows(kPlanes, kPanels), kStride = kPanels * kPanel;
    static thread_local Scratch scratch;
    float* sums = scratch.get<float>(task.rows * kStride);
    std::fill(sums, sums + task.rows * kStride, 0.0f);
    const int64_t tiles = (task.rows + kRows - 1) / kRows;
    for (int64_t block = 0; block < x.blocks; ++block) {
        const int64_t columns = block_columns(task.layout, block), lines = columns / Format::kStep;
        const uint8_t* next =
            block + 1 == x.blocks
                ? weight.codes + (panel + kPanels) * weight.panel_bytes
                : weight.codes + panel * weight.panel_bytes + (block + 1) * kActivationBlock / Format::kStep * kLineBytes;
        for (int64_t tile = 0, row = 0; tile < tiles; ++tile, row += kRows) {
            with_rows<kRows>(task.rows - row, [&](auto rows) {
                const Ahead ahead(next, weight.panel_bytes, lines, tile, tiles);
                multiply_tile<Format, rows, kPanels, kPlanes>(weight, x, {block, columns, panel, row}, ahead,
                                                              sums + row * kStride);
            });
        }
    }
    finish(task, panel, panel + kPanels, sums, kStride);
}

template <typename Format, int kPlanes>
void multiply_planes(const FullyConnectedTask& task, int64_t begin, int64_t end) {
    const Weight weight(task);
    const Prepared x(task.prepared, task.layout, task.rows, task.activation_bits);
    int64_t panel = begin;
    if (task.rows <= tile_rows(kPlanes, kFewRowsPanels)) {
        for (; panel + kFewRowsPanels <= end; panel += kFewRowsPanels) {
            multiply_panels<Format, kFewRowsPanels, kPlanes>(task, weight, x, panel);
        }
    }
    for (; panel + 2 <= end; panel += 2) multiply_panels<Format, 2, kPlanes>(task, weight, x, panel);
    if (panel < end) multiply_panels<Format, 1, kPlanes>(task, weight, x, panel);
}

template <typename Format>
void multiply(const FullyConnectedTask& task, int64_t begin, int64_t end) {
    if (task.activation_bits == 16) {
        multiply_planes<Format, 2>(task, begin, end);
    } else {
        multiply_planes<Format, 1>(task, begin, end);
    }
}

}  // namespace

namespace avx512 {

FullyConnectedKernel fully_connected_int8() {
    return {prepared_bytes, prepare, multiply<Int8>};
}

FullyConnectedKernel fully_connected_int4() {
    return {prepared_bytes, prepare, multiply<Int4>};
}

}  // namespace avx512
}  // namespace chatglm
