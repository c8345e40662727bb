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

// The sums of packed features with their scale and bias, kLanes at a time.
class Channels {
public:
    explicit Channels(const FullyConnectedTask& task)
        : scales_(task.layout.format == WeightFormat::int8 ? task.layout.channel_scales(task.weight) : nullptr),
          bias_(task.epilogue.bias) {}

    Floats operator()(int64_t feature, const float* sums) const {
        const Floats bias = bias_ ? load(bias_ + feature) : Floats{};
        return scales_ ? multiply_add(load(sums), load(scales_ + feature), bias) : load(sums) + bias;
    }

private:
    const float* scales_;
    const float* bias_;
};

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

struct RowRange {
    int64_t begin, end;
};

template <Activation kActivation>
void finish_rows(const FullyConnectedTask& task, RowRange rows, int64_t begin, int64_t end, const float* sums,
                 int64_t stride) {
    constexpr bool kGated = kActivation == Activation::silu_gate;
    const Channels channels(task);
    for (int64_t row = rows.begin; row < rows.end; ++row, sums += stride) {
        for (int64_t panel = begin; panel < end; panel += kGated ? 2 : 1) {
            for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
                const int64_t feature = panel * kPanel + lane;
                const float* at = sums + feature - begin * kPanel;
                Floats value = channels(feature, at);
                if (kActivation == Activation::gelu_tanh) value = gelu_tanh_of(value);
                if (kGated) value = silu_of(value) * channels(feature + kPanel, at + kPanel);
                add_residual_and_store(task, row, kGated ? panel / 2 * kPanel + lane : feature, value);
            }
        }
    }
}

// Features of y of the panels [begin, end), some rows of the task, from their sums: each row has its panels side by
// side, the first row at `sums`, the next `stride` floats further. Out of line, so that each path through a kernel
// rounds in the same way.
[[gnu::noinline]] void finish(const FullyConnectedTask& task, RowRange rows, int64_t begin, int64_t end,
                              const float* sums, int64_t stride) {
    switch (task.epilogue.activation) {
        case Activation::none: return finish_rows<Activation::none>(task, rows, begin, end, sums, stride);
        case Activation::gelu_tanh: return finish_rows<Activation::gelu_tanh>(task, rows, begin, end, sums, stride);
        case Activation::silu_gate: return finish_rows<Activation::silu_gate>(task, rows, begin, end, sums, stride);
    }
}

}  // namespace
}  // namespace chatglm
