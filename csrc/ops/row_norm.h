// One row through RMSNorm or LayerNorm.
#pragma once

#include "kernels/table.h"

namespace chatglm {

struct RowNorm {
    const float* weight = nullptr;  // [size]; nullptr: no norm
    const float* bias = nullptr;    // [size] in LayerNorm, nullptr in RMSNorm
    float eps = 0.0f;

    void apply(const ElementwiseKernel& kernel, const float* x, int64_t size, float* y) const {
        if (bias == nullptr) {
            kernel.rms_norm(x, weight, eps, size, y);
        } else {
            kernel.layer_norm(x, weight, bias, eps, size, y);
        }
    }
};

}  // namespace chatglm
