#include "kernels/levels.h"
#include "kernels/limit-inl.h"

namespace chatglm::avx2 {
namespace {

// Without VNNI, codes are widened and multiplied as 16-bit numbers.
double int16_operations(int64_t iterations) {
    const __m256i one = _mm256_set1_epi16(1);
    repeat_step(iterations, one, one,
                 [](__m256i sum, __m256i a, __m256i b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); });
    return operations(iterations, 16);
}

}  // namespace

LimitKernel limit() {
    return {read, int16_operations, f32_operations};
}

}  // namespace chatglm::avx2
