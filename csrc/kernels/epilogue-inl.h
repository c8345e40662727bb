// From the sums of a FullyConnected to y: channel scale, bias, activation, residual, store.
//
// Included by kernels/<level>/fully_connected*.cpp only; everything here has internal linkage, see simd-inl.h.
#pragma once

#include "kernels/simd-inl.h"
#include "kernels/table.h"

namespace chatglm {
namespace {

// a * b + c, rounded once.
inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return Floats(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#else
    return Floats(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#endif
}

// One vector of a row, kLanes sums of the packed features from `feature` on, with scale and bias.
inline Floats scaled_and_biased(const FullyConnectedTask& task, int64_t feature, const float* sums) {
    const Floats bias = task.epilogue.bias ? load(task.epilogue.bias + feature) : Floats{};
    if (task.layout.format != WeightFormat::int8) return load(sums) + bias;
    return multiply_add(load(sums), load(task.layout.channel_scales(task.weight) + feature), bias);
}

// Adds the residual to the features from `feature` on and stores those that y has.
inline void add_residual_and_store(const FullyConnectedTask& task, int64_t row, int64_t feature, Floats value) {
    const int64_t count = task.y_features - feature;
    if (count <= 0) return;
    const Epilogue& epilogue = task.epilogue;
    if (epilogue.residual) {
        const float* residual = epilogue.residual + row * epilogue.residual_stride + feature;
        value = multiply_add(count < kLanes ? load_part(residual, count) : load(residual),
                             broadcast(epilogue.residual_scale), value);
    }
    float* y = task.y + row * task.y_stride + feature;
    if (count < kLanes) {
        store_part(y, value, count);
    } else {
        store(y, value);
    }
}

// Features of y of the panels [begin, end), all rows of the task, from their sums: row r has its panels side by side
// from sums + r * stride floats on. Out of line, so that each path through a kernel rounds in the same way.
[[gnu::noinline]] void finish(const FullyConnectedTask& task, int64_t begin, int64_t end, const float* sums,
                              int64_t stride) {
    const Activation activation = task.epilogue.activation;
    const bool gated = activation == Activation::silu_gate;
    for (int64_t row = 0; row < task.rows; ++row, sums += stride) {
        for (int64_t panel = begin; panel < end; panel += gated ? 2 : 1) {
            for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
                const int64_t feature = panel * kPanel + lane;
                const float* at = sums + feature - begin * kPanel;
                Floats value = scaled_and_biased(task, feature, at);
                if (activation == Activation::gelu_tanh) value = gelu_tanh_of(value);
                if (gated) value = silu_of(value) * scaled_and_biased(task, feature + kPanel, at + kPanel);
                add_residual_and_store(task, row, gated ? panel / 2 * kPanel + lane : feature, value);
            }
        }
    }
}

}  // namespace
}  // namespace chatglm
