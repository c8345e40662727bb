#include "kernels/levels.h"
#include "kernels/limit-inl.h"

namespace chatglm::avx512 {
namespace {

double int8_operations(int64_t iterations) {
    const __m512i one = _mm512_set1_epi8(1);
    repeat_step(iterations, one, one, [](__m512i sum, __m512i a, __m512i b) { return _mm512_dpbusd_epi32(sum, a, b); });
    return operations(iterations, 64);
}

}  // namespace

LimitKernel limit() {
    return {read, int8_operations, f32_operations};
}

}  // namespace chatglm::avx512
