// A whole fully-connected layer with the kernels of one table, over the threads of a team.
#pragma once

#include "ops/row_norm.h"
#include "ops/team.h"

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

void run_fully_connected(const KernelTable& table, const FullyConnectedCall& call, Team& team);

}  // namespace chatglm
