#include "kernels/amx/trial.h"

#include <cstring>

#include "kernels/amx/tiles.h"

namespace chatglm::amx {

bool one_tile_trial() {
    constexpr int kSide = 16, kDepthBytes = 64;
    alignas(64) int8_t ones[kSide * kDepthBytes];
    alignas(64) int32_t sums[kSide * kSide] = {};
    std::memset(ones, 1, sizeof ones);
    // Without a destructor: an instruction that is illegal leaves by a jump.
    configure_tiles(configuration_of(kSide, kDepthBytes));
    zero_tile<0>();
    load_tile<4>(ones, kDepthBytes);
    load_tile<6>(ones, kDepthBytes);
    dot_s8_s8<0, 4, 6>();
    store_tile<0>(sums, kSide * sizeof(int32_t));
    release_tiles();
    return sums[0] == kDepthBytes && sums[kSide * kSide - 1] == kDepthBytes;
}

}  // namespace chatglm::amx
