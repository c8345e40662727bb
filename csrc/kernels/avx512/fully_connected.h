// The FullyConnected kernels of this level, a file each or two.
#pragma once

#include "kernels/table.h"

namespace chatglm::avx512 {

FullyConnectedKernel fully_connected_f32();
FullyConnectedKernel fully_connected_bf16();
FullyConnectedKernel fully_connected_int8();
FullyConnectedKernel fully_connected_int4();

}  // namespace chatglm::avx512
