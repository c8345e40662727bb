// FullyConnected for bf16 weights by the BF16 dot product: two columns of K, both factors bfloat16, sums float32.
//
// With few rows, where reading the weights is all that takes time, x stays float32 as in the level below.
#include <cstring>

#include "kernels/by_rows-inl.h"
#include "kernels/fully_connected_float-inl.h"
#include "kernels/levels.h"

namespace chatglm {
namespace {

constexpr int64_t kFloatRows = 4;

struct Dot {
    static constexpr int kParts = 1, kColumns = 2;
    // Measured on Zen 4: 13 to 16 rows take 11 to 27 % less time than in tiles, 20 to 24 rows 5 to 13 %.
    static constexpr int kStreamRows = 24;

    static Floats part(const uint8_t* line, int) { return Floats(_mm512_loadu_si512(line)); }

    static Floats add(Floats sum, Floats weights, Floats x) {
        return Floats(_mm512_dpbf16_ps(__m512(sum), (__m512bh)weights, (__m512bh)x));
    }

    // The instruction takes the word from memory by itself; GCC 12 makes two of it.
    static Floats add_from(Floats sum, Floats weights, const uint32_t* word) {
        asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(weights), "m"(*word));
        return sum;
    }

    // columns is a multiple of 32, as K is padded.
    static void convert(const float* x, int64_t count, int64_t columns, uint32_t* words) {
        for (int64_t i = 0; i < columns; i += 2 * kLanes) {
            const Floats first = load_before(x, i, count), second = load_before(x, i + kLanes, count);
            const __m512bh pairs = _mm512_cvtne2ps_pbh(__m512(second), __m512(first));
            std::memcpy(words + i / 2, &pairs, sizeof pairs);
        }
    }
};

const FullyConnectedKernel& choose(int64_t rows) {
    static const FullyConnectedKernel few = avx512::fully_connected_bf16(), many = kernel<Dot>();
    return rows <= kFloatRows ? few : many;
}

}  // namespace

namespace avx512_bf16 {

FullyConnectedKernel fully_connected_bf16() {
    return ByRows<choose>::kernel();
}

}  // namespace avx512_bf16
}  // namespace chatglm
