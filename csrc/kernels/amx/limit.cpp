#include <immintrin.h>

#include "kernels/levels.h"

namespace chatglm::amx {
namespace {

// Sums in tiles 0..3, operands in 4..7, as the kernels use them. A constant: GCC 12 takes the load to read 8 bytes
// only, and would drop stores into a local.
alignas(64) const struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t column_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
} kConfiguration;

void start() {
    _tile_loadconfig(&kConfiguration);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
}

// Operations of four products of 16 x 16 sums over `depth`.
double operations(int64_t iterations, int depth) {
    return 2.0 * static_cast<double>(iterations) * 4 * 16 * 16 * depth;
}

double int8_operations(int64_t iterations) {
    start();
    for (int64_t i = 0; i < iterations; ++i) {
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
    }
    _tile_release();
    return operations(iterations, 64);
}

double bf16_operations(int64_t iterations) {
    start();
    for (int64_t i = 0; i < iterations; ++i) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_release();
    return operations(iterations, 32);
}

}  // namespace

LimitKernel limit() {
    return {avx512::limit().read, int8_operations, bf16_operations};
}

}  // namespace chatglm::amx
