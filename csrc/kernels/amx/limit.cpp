// The rate of the tile products: four sums from four operands, as the kernels use them.
#include "kernels/amx/tiles.h"
#include "kernels/levels.h"

namespace chatglm::amx {
namespace {

constexpr int kSide = 16, kDepthBytes = 64;

void zero_operands() {
    zero_tile<4>();
    zero_tile<5>();
    zero_tile<6>();
    zero_tile<7>();
}

double int8_operations(int64_t iterations) {
    const TileScope tiles(kSide, kDepthBytes);
    zero_sums();
    zero_operands();
    for (int64_t i = 0; i < iterations; ++i) {
        dot_s8_s8<0, 4, 6>();
        dot_s8_s8<1, 4, 7>();
        dot_s8_s8<2, 5, 6>();
        dot_s8_s8<3, 5, 7>();
    }
    return 2.0 * static_cast<double>(iterations) * 4 * kSide * kSide * kDepthBytes;
}

double bf16_operations(int64_t iterations) {
    const TileScope tiles(kSide, kDepthBytes);
    zero_sums();
    zero_operands();
    for (int64_t i = 0; i < iterations; ++i) {
        dot_bf16<0, 4, 6>();
        dot_bf16<1, 4, 7>();
        dot_bf16<2, 5, 6>();
        dot_bf16<3, 5, 7>();
    }
    return 2.0 * static_cast<double>(iterations) * 4 * kSide * kSide * kDepthBytes / 2;
}

}  // namespace

LimitKernel limit() {
    return {avx512::limit().read, int8_operations, bf16_operations};
}

}  // namespace chatglm::amx
