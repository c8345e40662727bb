#include "kernels/levels.h"
#include "kernels/limit-inl.h"

namespace chatglm::avx_vnni {
namespace {

double int8_operations(int64_t iterations) {
    const __m256i one = _mm256_set1_epi8(1);
    repeat_step(iterations, one, one,
                [](__m256i sum, __m256i a, __m256i b) { return _mm256_dpbusd_avx_epi32(sum, a, b); });
    return operations(iterations, 32);
}

}  // namespace

LimitKernel limit() {
    const LimitKernel below = avx2::limit();
    return {below.read, int8_operations, below.bf16_operations};
}

}  // namespace chatglm::avx_vnni
