// The parts that each level offers; levels.cpp puts the tables together.
#pragma once

#include "kernels/table.h"

namespace chatglm {

namespace avx2 {
const KernelTable& table();
FullyConnectedKernel fully_connected_f32();
FullyConnectedKernel fully_connected_bf16();
FullyConnectedKernel fully_connected_int8();
FullyConnectedKernel fully_connected_int4();
AttentionKernel attention();
ElementwiseKernel elementwise();
LimitKernel limit();
}  // namespace avx2

// What AVX2 has, with VNNI in registers of 256 bits.
namespace avx_vnni {
const KernelTable& table();
FullyConnectedKernel fully_connected_int8();
FullyConnectedKernel fully_connected_int4();
LimitKernel limit();
}  // namespace avx_vnni

namespace avx512 {
const KernelTable& table();
FullyConnectedKernel fully_connected_f32();
FullyConnectedKernel fully_connected_bf16();
FullyConnectedKernel fully_connected_int8();
FullyConnectedKernel fully_connected_int4();
AttentionKernel attention();
ElementwiseKernel elementwise();
LimitKernel limit();
}  // namespace avx512

namespace avx512_bf16 {
const KernelTable& table();
FullyConnectedKernel fully_connected_bf16();
AttentionKernel attention();
LimitKernel limit();
}  // namespace avx512_bf16

namespace amx {
const KernelTable& table();
FullyConnectedKernel fully_connected(WeightFormat format);  // bf16, int8, int4
AttentionKernel attention();
LimitKernel limit();
}  // namespace amx

// The kernels of `amx` with tiles computed in plain C++, on AVX-512 BF16: for tests, selected by name only.
namespace amx_emulated {
const KernelTable& table();
FullyConnectedKernel fully_connected(WeightFormat format);
AttentionKernel attention();
}  // namespace amx_emulated

}  // namespace chatglm
