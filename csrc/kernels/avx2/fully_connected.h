// The FullyConnected kernels of this level, a file for two formats each.
#pragma once

#include "kernels/table.h"

namespace chatglm::avx2 {

constexpr int kHalves = 2;  // vectors of float32 or int32 to a panel
// The part of x in one block of K stays in the second-level cache while so many panels pass. Even, for silu_gate.
constexpr int64_t kPanelsAtATime = 8;
// Codes are prefetched this far ahead: a mapped file has pages of 4 KB, at whose ends the processor's own prefetcher
// stops.
constexpr int kPrefetchBytes = 2048;

FullyConnectedKernel fully_connected_f32();
FullyConnectedKernel fully_connected_bf16();
FullyConnectedKernel fully_connected_int8();
FullyConnectedKernel fully_connected_int4();

}  // namespace chatglm::avx2
