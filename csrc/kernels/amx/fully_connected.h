// The kernels of this level for many rows; fully_connected.cpp chooses them by the number of rows.
#pragma once

#include "kernels/amx/tiles.h"
#include "kernels/table.h"

namespace chatglm::CHATGLM_AMX_LEVEL {

FullyConnectedKernel fully_connected_bf16();
FullyConnectedKernel fully_connected_int8();
FullyConnectedKernel fully_connected_int4();

}  // namespace chatglm::CHATGLM_AMX_LEVEL
