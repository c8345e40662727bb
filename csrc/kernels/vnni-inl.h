// The instructions of the kernels that multiply bytes by VNNI, in registers of 512 bits (AVX-512 VNNI) or of 256
// (AVX-VNNI).
//
// Included by kernels/<level>/fully_connected*.cpp only; everything here has internal linkage, see simd-inl.h. A line
// of 64 bytes, 16 output features, is kPieces registers of kLanes features each.
#pragma once

#include "kernels/fully_connected-inl.h"

namespace chatglm {
namespace {

constexpr int kPieces = 16 / kLanes;
constexpr int kPieceBytes = 4 * kLanes;

#if defined(__AVX512F__)

typedef __m512i Bytes;

// Conversions under this mask are the plain instructions; GCC 12 warns of its own header's form without one.
constexpr __mmask16 kAll = 0xffff;
constexpr __mmask32 kAllBytes = 0xffffffff;

inline Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Bytes low_nibbles(Bytes v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
inline Bytes high_nibbles(Bytes v) { return _mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15)); }
inline Bytes broadcast_word(int32_t word) { return _mm512_set1_epi32(word); }

// Adds the products of four unsigned and four signed bytes a lane.
inline Ints add_products(Ints sum, Bytes codes, Bytes x) { return Ints(_mm512_dpbusd_epi32(__m512i(sum), codes, x)); }

// The same with the four bytes at `four` in all lanes. The instruction takes them from memory by itself; GCC 12 makes two
// of it.
inline Ints add_products_from(Ints sum, Bytes codes, const int8_t* four) {
    typedef int32_t Word [[gnu::may_alias, gnu::aligned(1)]];
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(*reinterpret_cast<const Word*>(four)));
    return sum;
}

// The products of two 16-bit numbers a lane, added.
inline Ints multiply_words(Ints a, int32_t word) {
    return Ints(_mm512_madd_epi16(__m512i(a), _mm512_set1_epi32(word)));
}

inline Ints widen_bytes(const uint8_t* p) {
    return Ints(_mm512_maskz_cvtepu8_epi32(kAll, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline Floats widen_halves(const uint16_t* p) {
    return Floats(_mm512_maskz_cvtph_ps(kAll, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}

#else

typedef __m256i Bytes;

inline Bytes load_bytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Bytes low_nibbles(Bytes v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
inline Bytes high_nibbles(Bytes v) { return _mm256_and_si256(_mm256_srli_epi16(v, 4), _mm256_set1_epi8(15)); }
inline Bytes broadcast_word(int32_t word) { return _mm256_set1_epi32(word); }

inline Ints add_products(Ints sum, Bytes codes, Bytes x) {
    return Ints(_mm256_dpbusd_avx_epi32(__m256i(sum), codes, x));
}

inline Ints multiply_words(Ints a, int32_t word) {
    return Ints(_mm256_madd_epi16(__m256i(a), _mm256_set1_epi32(word)));
}

inline Ints widen_bytes(const uint8_t* p) {
    return Ints(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline Floats widen_halves(const uint16_t* p) {
    return Floats(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

#endif

// Columns that `pack_planes` takes at once.
constexpr int64_t kPackedColumns = 32;

// Of 32 numbers, four at a time: their high bytes before their low bytes; without a second plane the low bytes only.
// q = 256 high + low, low in -128..127. words [8][kPlanes * 4], aligned to 64 bytes.
template <int kPlanes>
void pack_planes(const int16_t* q, int8_t* words) {
#if defined(__AVX512F__)
    const __m512i columns = load_words(q);
    const __m256i low = _mm512_maskz_cvtepi16_epi8(kAllBytes, columns);
    if constexpr (kPlanes == 1) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(words), low);
    } else {
        const __m512i rest = _mm512_sub_epi16(columns, _mm512_cvtepi8_epi16(low));
        const __m256i high = _mm512_maskz_cvtepi16_epi8(kAllBytes, _mm512_srai_epi16(rest, 8));
        const __m512i order = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        _mm512_store_si512(words,
                           _mm512_permutex2var_epi32(_mm512_castsi256_si512(high), order, _mm512_castsi256_si512(low)));
    }
#else
    for (int64_t k = 0; k < kPackedColumns; ++k) {
        int8_t* word = words + k / 4 * (kPlanes * 4) + k % 4;
        const auto low = static_cast<int8_t>(q[k]);
        word[(kPlanes - 1) * 4] = low;
        if constexpr (kPlanes == 2) word[0] = static_cast<int8_t>((q[k] - low) >> 8);
    }
#endif
}

}  // namespace
}  // namespace chatglm
