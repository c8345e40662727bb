// FullyConnected for int8 and int4 weights: unsigned codes in registers times signed bytes of x from memory (VNNI), one
// int32 accumulator for each row, plane of x (high and low byte with 16-bit activations) and panel.
//
// Included by kernels/<level>/fully_connected*.cpp only; everything here has internal linkage, see simd-inl.h.
#pragma once

#include "kernels/streams_vnni-inl.h"
#include "kernels/tiles_vnni-inl.h"

namespace chatglm {
namespace {

// Instructions that multiply a line, where so few that the line is best asked for late. Measured on Zen 4, with two
// cores: 4 of them read at 86 % (int8: two rows; int4 with 8-bit activations: two rows) where FarReach has 73 and 82; 6 at
// 75 % and FarReach at 86; 8 at 66 to 69 % and FarReach at 81 to 86.
constexpr int kFewProducts = 4;

template <typename Format, typename Reach, int kPlanes>
void multiply_planes(const FullyConnectedTask& task, int64_t begin, int64_t end) {
    const Weight weight(task);
    const Prepared x(task.prepared, task.layout, task.rows, task.activation_bits);
    constexpr int kStreamRows = stream_rows<Format>(kPlanes);
    if (task.rows <= kStreamRows) {
        multiply_streams<kStreamRows>(task, begin, end, [&](auto rows, int64_t panel, float* sums) {
            constexpr bool kFew = rows * kPlanes * (Format::kStep / 4) <= kFewProducts;
            stream_panel<Format, ReachFor<Reach, kFew>, rows, kPlanes>(task.layout, weight, x, panel, sums);
        });
    } else {
        multiply_tiles<Format, kPlanes>(task, weight, x, begin, end);
    }
}

template <typename Format, typename Reach>
void multiply(const FullyConnectedTask& task, int64_t begin, int64_t end) {
    if (task.activation_bits == 16) {
        multiply_planes<Format, Reach, 2>(task, begin, end);
    } else {
        multiply_planes<Format, Reach, 1>(task, begin, end);
    }
}

template <typename Format, typename Reach>
FullyConnectedKernel kernel() {
    return {prepared_bytes, prepare<Format>, multiply<Format, Reach>};
}

}  // namespace
}  // namespace chatglm
