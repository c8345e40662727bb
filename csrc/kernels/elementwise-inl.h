// Norms of a row, and the rotation of a head by rotary embeddings.
//
// Included by kernels/<level>/elementwise.cpp only; everything here has internal linkage, see simd-inl.h.
#pragma once

#include "kernels/simd-inl.h"
#include "kernels/table.h"

namespace chatglm {
namespace {

// Up to kLanes floats; the other lanes are 0.
inline Floats load_some(const float* p, int64_t count) {
    return count < kLanes ? load_part(p, count) : load(p);
}

inline void store_some(float* p, Floats v, int64_t count) {
    if (count < kLanes) return store_part(p, v, count);
    store(p, v);
}

// Sum of term(i, count), which gives the floats [i, i + count) with 0 in the other lanes, in an order that depends on
// `size` only.
template <typename Term>
inline float sum_over(int64_t size, const Term& term) {
    constexpr int kSums = 4;
    Floats sums[kSums] = {};
    int64_t i = 0;
    for (; i + kSums * kLanes <= size; i += kSums * kLanes) {
        for (int j = 0; j < kSums; ++j) sums[j] += term(i + j * kLanes, kLanes);
    }
    for (; i < size; i += kLanes) sums[0] += term(i, size - i);
    return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

inline void rms_norm(const float* x, const float* weight, float eps, int64_t size, float* y) {
    const float squares = sum_over(size, [&](int64_t i, int64_t count) {
        const Floats value = load_some(x + i, count);
        return value * value;
    });
    const float factor = 1.0f / std::sqrt(squares / static_cast<float>(size) + eps);
    for (int64_t i = 0; i < size; i += kLanes) {
        store_some(y + i, load_some(x + i, size - i) * factor * load_some(weight + i, size - i), size - i);
    }
}

// Two passes: the squares of the differences lose nothing to a large mean.
inline void layer_norm(const float* x, const float* weight, const float* bias, float eps, int64_t size, float* y) {
    const float mean = sum_over(size, [&](int64_t i, int64_t count) { return load_some(x + i, count); }) /
                       static_cast<float>(size);
    const float squares = sum_over(size, [&](int64_t i, int64_t count) {
        const Floats difference = load_some(x + i, count) - mean;
        return first_lanes(count) ? difference * difference : Floats{};
    });
    const float factor = 1.0f / std::sqrt(squares / static_cast<float>(size) + eps);
    for (int64_t i = 0; i < size; i += kLanes) {
        const Floats scaled = (load_some(x + i, size - i) - mean) * factor * load_some(weight + i, size - i);
        store_some(y + i, scaled + load_some(bias + i, size - i), size - i);
    }
}

inline void rotate(const float* x, const float* cos, const float* sin, int64_t half, int64_t head_dim, float scale,
                   float* y) {
    for (int64_t i = 0; i < half; i += kLanes) {
        const int64_t count = half - i;
        const Floats a = load_some(x + i, count), b = load_some(x + half + i, count);
        const Floats c = load_some(cos + i, count), s = load_some(sin + i, count);
        store_some(y + i, (a * c - b * s) * scale, count);
        store_some(y + half + i, (b * c + a * s) * scale, count);
    }
    for (int64_t i = 2 * half; i < head_dim; ++i) y[i] = x[i] * scale;
}

}  // namespace
}  // namespace chatglm
