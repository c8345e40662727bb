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

// Brings the scales of the panels [begin, end), which lie far from their codes, into the cache.
inline void prefetch_scales(const FullyConnectedTask& task, int64_t begin, int64_t end) {
    if (task.layout.format != WeightFormat::int8) return;
    const float* scales = task.layout.channel_scales(task.weight);
    for (int64_t panel = begin; panel < end; ++panel) _mm_prefetch(scales + panel * kPanel, _MM_HINT_T1);
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

// Where the sums of packed features lie: row r of the panels p and p + 1, p being even, from
// first + r * row_stride + p / 2 * pair_stride on, side by side. Panels count from the first that is finished.
struct Sums {
    const float* first;
    int64_t row_stride, pair_stride;

    const float* panel(int64_t row, int64_t p) const {
        return first + row * row_stride + p / 2 * pair_stride + p % 2 * kPanel;
    }
};

// Brings a part of a later row of the residual into the cache: rows lie pages apart, so that the processor does not
// find them by itself.
inline void prefetch_residual(const FullyConnectedTask& task, int64_t row, int64_t feature, int64_t count) {
    if (task.epilogue.residual == nullptr || row >= task.rows) return;
    const float* residual = task.epilogue.residual + row * task.epilogue.residual_stride + feature;
    for (int64_t i = 0; i < count; i += 16) _mm_prefetch(residual + i, _MM_HINT_T0);
}

template <Activation kActivation>
void finish_rows(const FullyConnectedTask& task, int64_t begin, int64_t end, const Sums& sums) {
    constexpr bool kGated = kActivation == Activation::silu_gate;
    constexpr int64_t kPanelsOfFeature = kGated ? 2 : 1, kRowsAhead = 4;
    const Channels channels(task);
    for (int64_t row = 0; row < task.rows; ++row) {
        prefetch_residual(task, row + kRowsAhead, begin / kPanelsOfFeature * kPanel,
                          (end - begin) / kPanelsOfFeature * kPanel);
        for (int64_t panel = begin; panel < end; panel += kPanelsOfFeature) {
            for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
                const int64_t feature = panel * kPanel + lane;
                const float* at = sums.panel(row, panel - begin) + lane;
                Floats value = channels(feature, at);
                if (kActivation == Activation::gelu_tanh) value = gelu_tanh_of(value);
                if (kGated) value = silu_of(value) * channels(feature + kPanel, at + kPanel);
                add_residual_and_store(task, row, kGated ? panel / 2 * kPanel + lane : feature, value);
            }
        }
    }
}

// Features of y of the panels [begin, end), all rows, from their sums. Out of line, so that each path through a kernel
// rounds in the same way.
[[gnu::noinline]] void finish(const FullyConnectedTask& task, int64_t begin, int64_t end, const Sums& sums) {
    switch (task.epilogue.activation) {
        case Activation::none: return finish_rows<Activation::none>(task, begin, end, sums);
        case Activation::gelu_tanh: return finish_rows<Activation::gelu_tanh>(task, begin, end, sums);
        case Activation::silu_gate: return finish_rows<Activation::silu_gate>(task, begin, end, sums);
    }
}

}  // namespace
}  // namespace chatglm
