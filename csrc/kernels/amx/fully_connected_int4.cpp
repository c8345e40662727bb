// int4 weights: the codes of a pair of panels less their zero points, expanded to int8 once per block of columns for
// all rows, and the exact integer sum of each group.
//
// Beside the 8 products of a group of 128 columns, 128 cycles, run with 16 / 8 bits, where two groups are taken
// together: 216 / 240 line loads (108 / 120 cycles of two ports), 80 / 96 line stores, and 160 / 192 vector operations
// (80 / 96 cycles of two ports; 5 for each of 32 vectors, 3 for each of 64). It fits, closely. Expanding to int8 takes
// 10 vector operations for 128 weights, once for all rows.
//
// Why not bf16: its products take the same 128 cycles and have no such sums, but expanding takes about 10 operations
// for 32 weights (2600 cycles for a pair of panels and 512 columns: a sixth of the products of 512 rows, more than
// those of 64), and it cannot gain from 8-bit activations.
#include "kernels/amx/fully_connected.h"
#include "kernels/amx/quantized.h"

namespace chatglm::CHATGLM_AMX_LEVEL {
namespace {

// Conversions under this mask are the plain instructions; GCC 12 warns of its own header's form without one.
constexpr __mmask16 kAll = 0xffff;

class Int4Weights {
public:
    static constexpr bool kUnsigned = false, kGrouped = true;

    explicit Int4Weights(const FullyConnectedTask& task) : layout_(task.layout), weight_(task.weight) {}

    int64_t group_columns(int64_t) const { return layout_.group_size; }

    // Valid until the next call.
    PairWeights load(const PairBlock& pair) {
        for (int64_t panel = 0; panel < pair.panels; ++panel) {
            expand_codes(pair, panel);
            expand_scales(pair, panel);
        }
        return {{codes_[0], codes_[pair.panels - 1]}, scales_[0][0]};
    }

    Prefetch prefetch(const PairBlock& pair, int64_t steps) const {
        if (pair.panels == 0) return {nullptr, nullptr, 0, 1};
        return {lines(pair, 0), lines(pair, pair.panels - 1), block_columns(layout_, pair.block) * kPanel / 2, steps};
    }

private:
    static constexpr int64_t kSmallestGroup = 32;

    const uint8_t* lines(const PairBlock& pair, int64_t panel) const {
        return layout_.panel(weight_, pair.panel + panel) + pair.block * kActivationBlock * kPanel / 2;
    }

    int64_t first_group(const PairBlock& pair) const { return pair.block * kActivationBlock / layout_.group_size; }

    void expand_codes(const PairBlock& pair, int64_t panel) {
        const int64_t columns = block_columns(layout_, pair.block), group = layout_.group_size;
        const uint8_t* from = lines(pair, panel);
        const uint8_t* zero_points = layout_.zero_points(weight_, pair.panel + panel) + first_group(pair) * kPanel;
        const __m512i nibble = _mm512_set1_epi8(15);
        uint8_t* out = codes_[panel];
        for (int64_t column = 0; column < columns; column += group, zero_points += kPanel) {
            // One zero point per feature, for its four neighbours of a line.
            const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(zero_points));
            const __m512i wide = _mm512_maskz_cvtepu8_epi32(kAll, narrow);
            const __m512i zero = _mm512_mullo_epi32(wide, _mm512_set1_epi32(0x01010101));
            for (int64_t k = 0; k < group; k += 8, from += 64, out += 128) {
                const __m512i raw = _mm512_loadu_si512(from);
                const __m512i low = _mm512_and_si512(raw, nibble);
                const __m512i high = _mm512_and_si512(_mm512_srli_epi16(raw, 4), nibble);
                _mm512_store_si512(out, _mm512_sub_epi8(low, zero));
                _mm512_store_si512(out + 64, _mm512_sub_epi8(high, zero));
            }
        }
    }

    void expand_scales(const PairBlock& pair, int64_t panel) {
        const int64_t groups = block_columns(layout_, pair.block) / layout_.group_size;
        const uint16_t* from = layout_.group_scales(weight_, pair.panel + panel) + first_group(pair) * kPanel;
        for (int64_t group = 0; group < groups; ++group) {
            const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + group * kPanel));
            _mm512_store_ps(scales_[group][panel], _mm512_maskz_cvtph_ps(kAll, half));
        }
    }

    const PackedLayout& layout_;
    const uint8_t* weight_;
    alignas(64) uint8_t codes_[2][kActivationBlock * kPanel];
    alignas(64) float scales_[kActivationBlock / kSmallestGroup][2][kPanel] = {};
};

template <int kPlanes>
void multiply_planes(const FullyConnectedTask& task, int64_t begin, int64_t end) {
    if (task.layout.group_size == 32) {
        multiply_quantized<Int4Weights, kPlanes, 32>(task, begin, end);
    } else {
        multiply_quantized<Int4Weights, kPlanes, 64>(task, begin, end);
    }
}

void multiply(const FullyConnectedTask& task, int64_t begin, int64_t end) {
    if (task.activation_bits == 16) {
        multiply_planes<2>(task, begin, end);
    } else {
        multiply_planes<1>(task, begin, end);
    }
}

}  // namespace

FullyConnectedKernel fully_connected_int4() {
    return {prepared_bytes_quantized, prepare_quantized, multiply};
}

}  // namespace chatglm::CHATGLM_AMX_LEVEL
