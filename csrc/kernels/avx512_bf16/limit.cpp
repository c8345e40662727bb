#include "kernels/levels.h"
#include "kernels/limit-inl.h"

namespace chatglm::avx512_bf16 {
namespace {

double bf16_operations(int64_t iterations) {
    const __m512i ones = _mm512_set1_epi16(0x3f80);
    // Operands stay integers: the bfloat16 vectors of compilers differ in what can be done with them.
    repeat_step(iterations, ones, ones, [](__m512i sum, __m512i a, __m512i b) {
        return _mm512_castps_si512(_mm512_dpbf16_ps(_mm512_castsi512_ps(sum), (__m512bh)a, (__m512bh)b));
    });
    return operations(iterations, 32);
}

}  // namespace

LimitKernel limit() {
    return {read, avx512::limit().int8_operations, bf16_operations};
}

}  // namespace chatglm::avx512_bf16
