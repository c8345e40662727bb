// FullyConnected for f32 and bf16 weights, both multiplied as float32.
#include <cstring>

#include "kernels/fully_connected_float-inl.h"
#include "kernels/levels.h"

namespace chatglm {
namespace {

struct OfFloats {
    static constexpr int kStreamRows = 12;  // of two sums each with bf16 weights: 24 registers

    static Floats add(Floats sum, Floats weights, Floats x) { return multiply_add(weights, x, sum); }
    static Floats add_from(Floats sum, Floats weights, const uint32_t* word) {
        return add(sum, weights, Floats(_mm512_set1_epi32(static_cast<int32_t>(*word))));
    }

    static void convert(const float* x, int64_t count, int64_t columns, uint32_t* words) {
        std::memcpy(words, x, static_cast<size_t>(count) * 4);
        std::fill(words + count, words + columns, 0u);
    }
};

struct F32 : OfFloats {
    static constexpr int kParts = 1, kColumns = 1;

    static Floats part(const uint8_t* line, int) { return Floats(_mm512_loadu_si512(line)); }
};

// A bfloat16 is the upper half of a float: of the two neighbours in 4 bytes the first has to be moved there.
struct Bf16 : OfFloats {
    static constexpr int kParts = 2, kColumns = 2;

    static Floats part(const uint8_t* line, int i) {
        const Ints both = Ints(_mm512_loadu_si512(line));
        return Floats(i == 0 ? both << 16 : both & static_cast<int32_t>(0xffff0000u));
    }
};

}  // namespace

namespace avx512 {

FullyConnectedKernel fully_connected_f32() {
    return kernel<F32>();
}

FullyConnectedKernel fully_connected_bf16() {
    return kernel<Bf16>();
}

}  // namespace avx512
}  // namespace chatglm
