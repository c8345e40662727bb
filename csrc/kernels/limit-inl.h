// The loops that measure what a core can do, for files in kernels/<level>/ (internal linkage, see simd-inl.h).
#pragma once

#include "kernels/simd-inl.h"
#include "kernels/table.h"

namespace chatglm {
namespace {

// Latency times throughput is up to 12 on current cores (BF16 dot products).
constexpr int kAccumulators = 12;

// step(sum, a, b) gives the next sum; the vectors are of integers, which may be the bits of floats. The empty statement
// keeps each step as it is written: no product leaves the loop.
template <typename Vector, typename Step>
void repeat_step(int64_t iterations, Vector a, Vector b, Step step) {
    Vector sums[kAccumulators] = {};
    for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 12  // before anything else is optimized, else the sums stay in memory
        for (Vector& sum : sums) {
            sum = step(sum, a, b);
            asm volatile("" : "+v"(a), "+v"(sum));
        }
    }
#pragma GCC unroll 12
    for (const Vector& sum : sums) a ^= sum;
    asm volatile("" ::"v"(a));
}

// Operations of repeat_step when a step does `products` multiply-adds.
inline double operations(int64_t iterations, int products) {
    return 2.0 * static_cast<double>(iterations) * kAccumulators * products;
}

inline double f32_operations(int64_t iterations) {
    const Ints one = bits_of(broadcast(1.0f));
    repeat_step(iterations, one, one, [](Ints sum, Ints a, Ints b) {
        return bits_of(floats_of_bits(sum) + floats_of_bits(a) * floats_of_bits(b));
    });
    return operations(iterations, kLanes);
}

// Far enough ahead to hide the latency of memory, in bytes.
constexpr int64_t kReadAhead = 4096;

inline void read(const uint8_t* data, int64_t bytes) {
    constexpr int64_t kStep = 256;
    constexpr int kVectors = kStep / sizeof(Floats);
    Ints seen[4] = {};
    int64_t at = 0;
    for (; at + kStep <= bytes; at += kStep) {
        for (int64_t line = 0; line < kStep; line += 64) _mm_prefetch(data + at + kReadAhead + line, _MM_HINT_T1);
        for (int i = 0; i < kVectors; ++i) {
            seen[i % 4] ^= bits_of(load(reinterpret_cast<const float*>(data + at) + i * kLanes));
        }
    }
    for (; at < bytes; ++at) seen[0] ^= data[at];
    for (const Ints& part : seen) asm volatile("" ::"v"(part));
}

}  // namespace
}  // namespace chatglm
