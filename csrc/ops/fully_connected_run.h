// A whole fully-connected layer with the kernels of one table, over the threads of the calling arena.
#pragma once

#include "ops/row_norm.h"

namespace chatglm {

struct FullyConnectedCall {
    PackedLayout layout;
    const uint8_t* weight;  // payload of layout.bytes()
    int activation_bits;
    int64_t rows;
    const float* x;  // [rows, in_features]
    RowNorm norm;    // of x, before it is multiplied
    Epilogue epilogue;
    float* y;  // [rows, y_features]
    int64_t y_features;
};

void run(const KernelTable& table, const FullyConnectedCall& call);

}  // namespace chatglm
