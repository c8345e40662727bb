// What the two files of FullyConnected kernels here share.
#pragma once

#include <cstdint>

#include "kernels/levels.h"

namespace chatglm::avx2 {

constexpr int kHalves = 2;  // vectors of float32 or int32 to a panel
// The part of x in one block of K stays in the second-level cache while so many panels pass. Even, for silu_gate.
constexpr int64_t kPanelsAtATime = 8;
// Codes are prefetched this far ahead: a mapped file has pages of 4 KB, at whose ends the processor's own prefetcher
// stops.
constexpr int kPrefetchBytes = 2048;

}  // namespace chatglm::avx2
