// Vectors of floats as wide as the level that the including file is compiled for, by GCC's vector extension.
//
// Included by files in kernels/<level>/ only, inside their own namespace, so that no function of one level is taken
// for another by the linker: everything here has internal linkage.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace chatglm {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Bits __attribute__((vector_size(kLanes * 4)));
typedef int16_t Shorts __attribute__((vector_size(kLanes * 2)));

inline Floats load(const float* p) {
    Floats v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline void store(float* p, Floats v) {
    std::memcpy(p, &v, sizeof v);
}

// The first n < kLanes floats; the others are 0.
inline Floats load_part(const float* p, int64_t n) {
    float lanes[kLanes] = {};
    std::memcpy(lanes, p, static_cast<size_t>(n) * 4);
    return load(lanes);
}

inline void store_part(float* p, Floats v, int64_t n) {
    float lanes[kLanes];
    store(lanes, v);
    std::memcpy(p, lanes, static_cast<size_t>(n) * 4);
}

// Minus zero keeps every value as it is, -0.0 and NaN too.
inline Floats broadcast(float value) {
    return value - Floats{};
}

inline float sum_of(Floats v) {
    float lanes[kLanes];
    store(lanes, v);
    // Pairwise, in a fixed order.
    for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    return lanes[0];
}

inline Floats max_of(Floats a, Floats b) {
    return a > b ? a : b;
}

inline Floats min_of(Floats a, Floats b) {
    return a < b ? a : b;
}

inline float largest_of(Floats v) {
    float lanes[kLanes];
    store(lanes, v);
    float largest = lanes[0];
    for (int i = 1; i < kLanes; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
    return largest;
}

inline Ints bits_of(Floats v) {
    Ints bits;
    std::memcpy(&bits, &v, sizeof bits);
    return bits;
}

inline Floats floats_of_bits(Ints bits) {
    Floats v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
}

// True in the first `count` lanes.
inline Ints first_lanes(int64_t count) {
    static constexpr int32_t kIndices[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    Ints indices;
    std::memcpy(&indices, kIndices, sizeof indices);
    return indices < static_cast<int32_t>(count < kLanes ? count : kLanes);
}

inline Floats absolute(Floats v) {
    return floats_of_bits(bits_of(v) & 0x7fffffff);
}

constexpr float kLeastExponent = -87.33654f, kMostExponent = 88.72283f;

// x, where exp_of needs it, between its bounds; NaN stays. AVX-512 needs the upper one only, as its result is masked,
// and a little above it, for infinity.
inline Floats clamped_to_exponents(Floats x) {
#if defined(__AVX512F__)
    return Floats(_mm512_maskz_min_ps(0xffff, _mm512_set1_ps(89.0f), __m512(x)));
#else
    const Floats low = broadcast(kLeastExponent), high = broadcast(kMostExponent);
    const Floats above = low > x ? low : x;
    return high < above ? high : above;
#endif
}

// 1.5 * 2^23: added to a number of at most 2^22 it rounds that to an integer, ties to even, and leaves it in the low
// bits.
constexpr float kRoundingShift = 12582912.0f;

// exp(x) to 1 unit in the last place for x in [-87.33654, 88.72283]; smaller x give 0, larger ones infinity, NaN gives
// NaN. x = n ln2 + r with |r| <= ln2 / 2; exp(r) by the polynomial 1 + r + r^2 (..) of degree 6 whose largest relative
// error is least (4e-9), times 2^n.
inline Floats exp_of(Floats x) {
    const Floats inside = clamped_to_exponents(x);
    const Floats shift = broadcast(kRoundingShift);
    const Floats shifted = inside * 1.44269504f + shift;
    const Floats n = shifted - shift;
    // ln2 in two parts, the first with few bits, so that n * first is exact.
    const Floats r = (inside - n * 0.693359375f) + n * 2.12194440e-4f;
    Floats p = broadcast(0.0013814539f);
    p = p * r + 0.008368745f;
    p = p * r + 0.04166839f;
    p = p * r + 0.16666521f;
    p = p * r + 0.49999994f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
#if defined(__AVX512F__)
    // The mask is true for NaN. 2^n overflows where it should.
    const __mmask16 is_not_below = _mm512_cmp_ps_mask(__m512(x), __m512(broadcast(kLeastExponent)), _CMP_NLT_UQ);
    return Floats(_mm512_maskz_scalef_ps(is_not_below, __m512(p), __m512(n)));
#else
    // p is in [0.7, 1.5): n goes into its exponent, and where n = 128, p is below 1. Unsigned, as NaN may wrap around.
    const Floats result = floats_of_bits(Ints(Bits(bits_of(p)) + (Bits(bits_of(shifted)) << 23)));
    const Floats outside = x < kLeastExponent ? Floats{} : x + std::numeric_limits<float>::infinity();
    return inside == x ? result : outside;
#endif
}

// 1 / (1 + exp(-x)).
inline Floats sigmoid_of(Floats x) {
    return 1.0f / (1.0f + exp_of(-x));
}

inline Floats silu_of(Floats x) {
    return x * sigmoid_of(x);
}

// GELU in its tanh form: 0.5 x (1 + tanh(u)) = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3).
inline Floats gelu_tanh_of(Floats x) {
    const Floats u = 0.797884561f * (x + 0.044715f * x * x * x);
    return x * sigmoid_of(2.0f * u);
}

}  // namespace
}  // namespace chatglm
