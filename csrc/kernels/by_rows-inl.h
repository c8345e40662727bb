// One of several kernels by the number of rows.
//
// Included by kernels/<level>/fully_connected.cpp only; everything here has internal linkage, see simd-inl.h.
#pragma once

#include "kernels/table.h"

namespace chatglm {
namespace {

// The kernel that does what kChoose(rows) does.
template <const FullyConnectedKernel& (*kChoose)(int64_t rows)>
struct ByRows {
    static int64_t prepared_bytes(const PackedLayout& layout, int64_t rows, int activation_bits) {
        return kChoose(rows).prepared_bytes(layout, rows, activation_bits);
    }
    static void prepare(const PackedLayout& layout, int64_t rows, int activation_bits, const float* x,
                        int64_t x_stride, int64_t begin, int64_t end, void* prepared) {
        kChoose(rows).prepare(layout, rows, activation_bits, x, x_stride, begin, end, prepared);
    }
    static void multiply(const FullyConnectedTask& task, int64_t begin, int64_t end) {
        kChoose(task.rows).multiply(task, begin, end);
    }
    static FullyConnectedKernel kernel() { return {prepared_bytes, prepare, multiply}; }
};

}  // namespace
}  // namespace chatglm
