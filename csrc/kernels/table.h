// What a kernel is asked to do, and the table of those in use.
//
// Kernels run on the calling thread and keep no state; csrc/ops splits work over threads. All float buffers are
// float32. No pointer needs an alignment unless its line says so: weights lie where the mapped file has them.
#pragma once

#include <cstdint>
#include <string>

#include "kernels/cache_layout.h"
#include "kernels/isa.h"
#include "kernels/packing.h"

namespace chatglm {

enum class Activation { none, gelu_tanh, silu_gate };

// Throws std::invalid_argument that lists the names.
Activation parse_activation(const std::string& name);

// y = activation(x W^T + bias) + residual_scale * residual.
// silu_gate: panels 2 i hold the gate, panels 2 i + 1 what it multiplies; panel pair i makes features 16 i of y.
struct Epilogue {
    const float* bias = nullptr;  // [16 panels], in panel order, zero on padding
    Activation activation = Activation::none;
    const float* residual = nullptr;  // [rows, y_features], rows residual_stride floats apart
    int64_t residual_stride = 0;
    float residual_scale = 1.0f;
};

struct FullyConnectedTask {
    PackedLayout layout;
    const uint8_t* weight;  // starts at a multiple of 64 bytes of the file
    int64_t rows;           // at most kMaxRows
    int activation_bits;    // int8, int4: 16 (two 8-bit planes) or 8
    const void* prepared;   // what `prepare` made of x, aligned to 64 bytes
    Epilogue epilogue;
    float* y;  // [rows, y_features], rows y_stride floats apart
    int64_t y_stride;
    int64_t y_features;  // out_features without padding; half of them with silu_gate
};

// More rows than these are done in several tasks: what is prepared stays in the cache.
constexpr int64_t kMaxRows = 512;

// Columns of x that share an activation scale in int8 and int4 (the last block may be shorter).
constexpr int64_t kActivationBlock = 512;

// One weight format. int8 and int4 quantize x by row and block of kActivationBlock columns:
//   16 bits: q = rint(x * (1 / s)), s = max|x| / 32639, |q| <= 32639 = 127 * 256 + 127;
//            q = 256 hi + lo, both in -128..127
//    8 bits: q = rint(x * (1 / s)), s = max|x| / 127
// s is at least the smallest normal number. A block with a value that is not finite has s = NaN and q = 0, so that
// its row becomes NaN. The sum over a block is an exact integer T (code - zero_point times q, in int4 per group), and y
// is fma(float(T), s, y) over blocks in rising order, then times the channel's scale (int4: s times the group's scale,
// group by group): so the result of a row depends neither on the number of rows nor on the instruction set.
// Only int4 has another result with the tiles of AMX, which many rows use there: see amx/fully_connected_int4.cpp.
struct FullyConnectedKernel {
    // Bytes of `prepared` for that many rows.
    int64_t (*prepared_bytes)(const PackedLayout& layout, int64_t rows, int activation_bits);
    // Fills the part of `prepared` of the rows [begin, end) of x [rows, in_features], rows x_stride floats apart.
    void (*prepare)(const PackedLayout& layout, int64_t rows, int activation_bits, const float* x, int64_t x_stride,
                    int64_t begin, int64_t end, void* prepared);
    // Output features of the panels [begin, end), all rows. With silu_gate both are even.
    void (*multiply)(const FullyConnectedTask& task, int64_t begin, int64_t end);
};

// Up to kTileRows query rows that share a kv head, against a range of its slots.
constexpr int64_t kTileRows = 16;

struct AttentionTile {
    CacheLayout layout;
    int64_t rows;                  // 1..kTileRows
    const float* query;            // [rows, padded_dim], rotated, times 1 / sqrt(head_dim), zero on padding
    const int64_t* visible;        // [rows]: row r sees the slots before visible[r]
    const uint8_t* const* blocks;  // block of slot s: blocks[s / kBlockSlots]
    int64_t begin, end;            // slots; begin is a multiple of kBlockSlots. Slots from `end` on are not valid
    int64_t ahead_end;             // slots that `blocks` has, at least `end`: those from `end` on are prefetched
    // Out. With p = exp(score - max) over the visible slots of the range: sum of p, and sum of p times value.
    // A row that sees none of them: max = -infinity, sum = 0, context = 0.
    float* context;  // [rows, padded_dim]
    float* max;      // [rows]
    float* sum;      // [rows]
};

struct AttentionKernel {
    // Writes key and value [head_dim] of one token into slot 0..31 of a block, rounding to nearest (int8:
    // scale = max|x| / 127). Dims of padding become zero.
    void (*append)(const CacheLayout& layout, uint8_t* block, int64_t slot, const float* key, const float* value);
    void (*attend)(const AttentionTile& tile);
    // Folds one partial result of a row into another over [dim]: both become one softmax over both ranges.
    void (*merge)(int64_t dim, const float* context, float max, float sum, float* into_context, float* into_max,
                  float* into_sum);
};

struct ElementwiseKernel {
    // y = x / sqrt(mean(x^2) + eps) * weight, over [size].
    void (*rms_norm)(const float* x, const float* weight, float eps, int64_t size, float* y);
    // y = (x - mean) / sqrt(variance + eps) * weight + bias, over [size].
    void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, int64_t size, float* y);
    // Rotate-half of one head: for i < half, y[i] = x[i] cos[i] - x[i + half] sin[i] and
    // y[i + half] = x[i + half] cos[i] + x[i] sin[i]; dims from 2 half to head_dim are copied. All of y times scale.
    void (*rotate)(const float* x, const float* cos, const float* sin, int64_t half, int64_t head_dim, float scale,
                   float* y);
};

// What `chatglm-ov bench` measures shares against.
struct LimitKernel {
    // Reads `bytes` once, in order.
    void (*read)(const uint8_t* data, int64_t bytes);
    // Multiply-adds from registers, as the kernels of that level use them; returns operations (2 a multiply-add).
    double (*int8_operations)(int64_t iterations);
    double (*bf16_operations)(int64_t iterations);
};

struct KernelTable {
    const char* level;                        // name of an Isa, or amx_emulated
    FullyConnectedKernel fully_connected[4];  // by WeightFormat
    AttentionKernel attention;
    ElementwiseKernel elementwise;
    LimitKernel limit;
};

// The table of a level. Throws std::runtime_error if the machine lacks it.
const KernelTable& kernels(Isa isa);

// The same by its name; also "amx_emulated" (levels.h), which no machine selects by itself. Throws as parse_isa and
// kernels do.
const KernelTable& kernels_by_name(const std::string& name);

// The table in use, selected at the first call: what selected_isa says, or amx_emulated where CHATGLM_OV_ISA names it.
const KernelTable& kernels();

}  // namespace chatglm
