#include "kernels/amx/trial.h"

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace chatglm::amx {

bool one_tile_trial() {
    // A constant: GCC 12 takes the load to read 8 bytes only, and would drop stores into a local.
    alignas(64) static const struct {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t column_bytes[16] = {64, 64, 64};
        uint8_t rows[16] = {16, 16, 16};
    } configuration;
    alignas(64) int8_t ones[1024];
    alignas(64) int32_t sums[256];
    std::memset(ones, 1, sizeof ones);
    std::memset(sums, 0, sizeof sums);
    _tile_loadconfig(&configuration);
    _tile_zero(0);
    _tile_loadd(1, ones, 64);
    _tile_loadd(2, ones, 64);
    _tile_dpbssd(0, 1, 2);
    _tile_stored(0, sums, 64);
    _tile_release();
    return sums[0] == 64 && sums[255] == 64;
}

}  // namespace chatglm::amx
