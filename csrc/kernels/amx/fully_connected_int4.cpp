// int4 weights: expanded once per block of columns for all rows, to bf16 with 16-bit activations, to int8 with 8-bit
// ones.
//
// Exact sums of each group of 128 columns, as with few rows, would have to become floats 4 times as often as those of
// int8: what that takes beside the tiles was measured, without the tiles, at three times what it is with lines in bf16
// or int8, and longer than the products themselves.
//
// Expanding takes 24 (bf16) or 10 (int8) cycles of two vector ports a line of int4: for a pair of panels 1536 cycles a
// block of 256 columns, or 1280 a block of 512. They are hidden in the products, which with 512 rows take 8192.
#include "kernels/amx/fully_connected.h"
#include "kernels/amx/products_bf16.h"
#include "kernels/amx/products_int8.h"

namespace chatglm::CHATGLM_AMX_LEVEL {
namespace {

// Conversions under these masks are the plain instructions; GCC 12 warns of its own header's forms without them.
constexpr __mmask16 kAll = 0xffff;
constexpr __mmask32 kAllWords = 0xffffffff;

Floats load_scales(const uint16_t* halves) {
    return Floats(_mm512_maskz_cvtph_ps(kAll, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves))));
}

Ints load_zero_points(const uint8_t* bytes) {
    return Ints(_mm512_maskz_cvtepu8_epi32(kAll, _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes))));
}

Ints load_line(const uint8_t* line) {
    Ints codes;
    std::memcpy(&codes, line, sizeof codes);
    return codes;
}

// Weights in bf16: scale * (code - zero point), exact in float32, rounded once.
struct Int4ToBf16 {
    static constexpr int64_t kBlockColumns = kBf16Block;
    static constexpr int64_t kExpandedBytes = 4 * kLineBytes;

    struct Factors {
        Floats scale, offset;
    };

    static void make_factors(const uint16_t* scales, const uint8_t* zero_points, int64_t groups, Factors* factors,
                             float*) {
        for (int64_t group = 0; group < groups; ++group) {
            const Floats scale = load_scales(scales + group * kPanel);
            factors[group] = {scale, -scale * floats_of(load_zero_points(zero_points + group * kPanel))};
        }
    }

    static void expand(const uint8_t* line, const Factors& factors, uint8_t* out) {
        const Ints codes = load_line(line);
        expand_pair<0>(codes, factors, out);
        expand_pair<16>(codes, factors, out + kLineBytes);
        expand_pair<4>(codes, factors, out + 2 * kLineBytes);
        expand_pair<20>(codes, factors, out + 3 * kLineBytes);
    }

private:
    // Two neighbours of K, whose codes lie kShift and kShift + 8 bits up in the lane of their feature.
    template <int kShift>
    static void expand_pair(Ints codes, const Factors& factors, uint8_t* out) {
        const __m512i in_turns = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                                  23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        const __m512bh both = _mm512_cvtne2ps_pbh(__m512(weights<kShift + 8>(codes, factors)),
                                                  __m512(weights<kShift>(codes, factors)));
        _mm512_store_si512(out, _mm512_maskz_permutexvar_epi16(kAllWords, in_turns, __m512i(both)));
    }

    template <int kShift>
    static Floats weights(Ints codes, const Factors& factors) {
        return multiply_add(floats_of(codes >> kShift & 15), factors.scale, factors.offset);
    }
};

// Weights in signed int8, with a scale for each feature of a block: the largest weight that one of its groups can have,
// by 127. So each is off by half a step of that scale, as 8-bit activations are of theirs: where the step of int4 is
// largest, by a sixteenth of it at most.
struct Int4ToInt8 {
    static constexpr int64_t kBlockColumns = kActivationBlock;
    static constexpr int64_t kExpandedBytes = 2 * kLineBytes;

    typedef int16_t Words __attribute__((vector_size(64)));

    // Of each feature twice, for the two 16-bit parts of its lane: 16 times the zero point, and 2^11 times what a step
    // of the codes is in int8, at most 2^11 * 127 / 8.
    struct Factors {
        Words zero_points, multipliers;
    };

    static void make_factors(const uint16_t* scales, const uint8_t* zero_points, int64_t groups, Factors* factors,
                             float* block_scales) {
        Floats largest{};
        for (int64_t group = 0; group < groups; ++group) {
            const Ints below = load_zero_points(zero_points + group * kPanel), above = 15 - below;
            const Floats reach = floats_of(below > above ? below : above);
            largest = max_of(reach * absolute(load_scales(scales + group * kPanel)), largest);
        }
        store(block_scales, largest / 127.0f);
        const Floats per_scale = largest > 0.0f ? 127.0f * 2048.0f / largest : Floats{};
        for (int64_t group = 0; group < groups; ++group) {
            const Ints zero = load_zero_points(zero_points + group * kPanel) << 4;
            const Floats multiplier = load_scales(scales + group * kPanel) * per_scale;
            const Ints whole = bits_of(multiplier + kRoundingShift) & 0xffff;
            factors[group] = {Words(zero | zero << 16), Words(whole | whole << 16)};
        }
    }

    static void expand(const uint8_t* line, const Factors& factors, uint8_t* out) {
        const Bits codes = Bits(load_line(line));
        store_line(codes << 4, codes >> 4, factors, out);
        store_line(codes, codes >> 8, factors, out + kLineBytes);
    }

private:
    // Four neighbours of K: the codes of the first and third lie in bits 4 to 7 of the 16-bit parts of `even`, those of
    // the second and fourth in `odd`.
    static void store_line(Bits even, Bits odd, const Factors& factors, uint8_t* out) {
        const Words low = weights(even, factors) & 0xff, high = weights(odd, factors) << 8;
        const Words line = low | high;
        std::memcpy(out, &line, sizeof line);
    }

    static Words weights(Bits codes, const Factors& factors) {
        const Words differences = Words(codes & 0x00f000f0u) - factors.zero_points;
        return Words(_mm512_maskz_mulhrs_epi16(kAllWords, __m512i(differences), __m512i(factors.multipliers)));
    }
};

int64_t prepared_bytes(const PackedLayout& layout, int64_t rows, int activation_bits) {
    const auto of_bits = activation_bits == 16 ? prepared_bytes_bf16 : prepared_bytes_quantized;
    return of_bits(layout, rows, activation_bits);
}

void prepare(const PackedLayout& layout, int64_t rows, int activation_bits, const float* x, int64_t x_stride,
             int64_t begin, int64_t end, void* prepared) {
    const auto of_bits = activation_bits == 16 ? prepare_bf16 : prepare_quantized;
    of_bits(layout, rows, activation_bits, x, x_stride, begin, end, prepared);
}

void multiply(const FullyConnectedTask& task, int64_t begin, int64_t end) {
    if (task.activation_bits == 16) {
        multiply_bf16<ExpandedWeights<Int4ToBf16>>(task, begin, end);
    } else {
        multiply_quantized<1, false, ExpandedWeights<Int4ToInt8>>(task, begin, end);
    }
}

}  // namespace

FullyConnectedKernel fully_connected_int4() {
    return {prepared_bytes, prepare, multiply};
}

}  // namespace chatglm::CHATGLM_AMX_LEVEL
