// FullyConnected for f32 and bf16 weights: float32 multiply-adds, bfloat16 widened in registers.
//
// A tile is 5 or 6 rows by one panel, or one row by two panels, two accumulators for each row and panel. It walks over
// one block of K, whose codes stay in the first-level cache while all rows pass. Each element of y is one chain of
// multiply-adds in rising order of k, so that it does not depend on the tile.
#include <immintrin.h>

#include "kernels/avx2/fully_connected.h"
#include "kernels/epilogue-inl.h"
#include "kernels/fully_connected-inl.h"
#include "kernels/memory.h"

namespace chatglm::avx2 {
namespace {

constexpr int64_t kBlock = 256;  // columns; a panel of it is at most 16 KB

struct F32 {
    static constexpr int kStep = 1;  // columns of a line of 64 bytes
    static constexpr int kRows = 6;  // of a tile: 12 sums, 2 weights and an x fit 16 registers

    static Floats weight(const uint8_t* line, int half, int) {
        return load(reinterpret_cast<const float*>(line) + half * kLanes);
    }
};

struct Bf16 {
    static constexpr int kStep = 2;
    static constexpr int kRows = 5;  // and a mask

    static Floats weight(const uint8_t* line, int half, int odd) {
        const Ints both = bits_of(load(reinterpret_cast<const float*>(line) + half * kLanes));
        return floats_of_bits(odd ? both & ~0xffff : both << 16);
    }
};

// Where the parts of a tile lie in one block of K.
struct TileOfBlock {
    int64_t columns;
    const uint8_t* weight;  // of the first panel
    int64_t panel_bytes;
    const float* x;  // [rows, columns]
    float* sums;     // [rows][panels][16], rows `stride` floats apart
    int64_t stride;
};

template <typename Format, int kRows, int kPanels>
[[gnu::noinline]] void multiply_tile(const TileOfBlock& tile) {
    constexpr int kVectors = kPanels * kHalves;
    Floats sums[kRows][kVectors];
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[r][v] = load(tile.sums + r * tile.stride + v * kLanes);
    }
    const uint8_t* line = tile.weight;
    for (int64_t k = 0; k < tile.columns; k += Format::kStep, line += kLineBytes) {
#pragma GCC unroll 2
        for (int p = 0; p < kPanels; ++p) _mm_prefetch(line + p * tile.panel_bytes + kPrefetchBytes, _MM_HINT_T0);
        _mm_prefetch(tile.x + kRows * (tile.columns + k), _MM_HINT_T0);  // for the tile of the next rows
#pragma GCC unroll 2
        for (int i = 0; i < Format::kStep; ++i) {
            Floats weight[kVectors];
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
                weight[v] = Format::weight(line + v / kHalves * tile.panel_bytes, v % kHalves, i);
            }
#pragma GCC unroll 6
            for (int r = 0; r < kRows; ++r) {
                const Floats x = broadcast(tile.x[r * tile.columns + k + i]);
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v) sums[r][v] = multiply_add(weight[v], x, sums[r][v]);
            }
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) store(tile.sums + r * tile.stride + v * kLanes, sums[r][v]);
    }
}

int64_t prepared_bytes(const PackedLayout& layout, int64_t rows, int) {
    return rows * layout.padded_in() * 4;
}

// prepared: float32 [block][row][columns of the block], with the padding of the weight.
void prepare(const PackedLayout& layout, int64_t rows, int, const float* x, int64_t x_stride, int64_t begin,
             int64_t end, void* prepared) {
    for (int64_t start = 0; start < layout.padded_in(); start += kBlock) {
        const int64_t columns = std::min(kBlock, layout.padded_in() - start);
        const int64_t count = std::clamp<int64_t>(layout.in_features - start, 0, columns);
        for (int64_t row = begin; row < end; ++row) {
            const float* from = x + row * x_stride + start;
            float* to = static_cast<float*>(prepared) + start * rows + row * columns;
            std::fill(std::copy(from, from + count, to), to + columns, 0.0f);
        }
    }
}

// Sums of the panels [begin, end), all rows, in tiles of kRows by kPanels.
template <typename Format, int kRows, int kPanels>
void multiply_panels(const FullyConnectedTask& task, int64_t begin, int64_t end, float* sums, int64_t stride) {
    const auto* x = static_cast<const float*>(task.prepared);
    const int64_t padded_in = task.layout.padded_in(), panel_bytes = task.layout.panel_bytes();
    for (int64_t start = 0; start < padded_in; start += kBlock) {
        const int64_t columns = std::min(kBlock, padded_in - start);
        for (int64_t panel = begin; panel < end; panel += kPanels) {
            const uint8_t* weight = task.weight + panel * panel_bytes + start / Format::kStep * kLineBytes;
            for (int64_t row = 0; row < task.rows; row += kRows) {
                const TileOfBlock tile{columns,
                                       weight,
                                       panel_bytes,
                                       x + start * task.rows + row * columns,
                                       sums + row * stride + (panel - begin) * kPanel,
                                       stride};
                with_rows<kRows>(task.rows - row, [&](auto rows) { multiply_tile<Format, rows, kPanels>(tile); });
            }
        }
    }
}

template <typename Format>
void multiply(const FullyConnectedTask& task, int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    // One row has no use for blocks: a pair of panels from end to end reads two streams.
    const int64_t at_a_time = task.rows == 1 ? 2 : kPanelsAtATime;
    for (int64_t first = begin; first < end; first += at_a_time) {
        const int64_t last = std::min(first + at_a_time, end), stride = (last - first) * kPanel;
        float* sums = scratch.get<float>(task.rows * stride);
        std::fill_n(sums, task.rows * stride, 0.0f);
        if (task.rows == 1 && last - first == 2) {
            multiply_panels<Format, 1, 2>(task, first, last, sums, stride);
        } else {
            multiply_panels<Format, Format::kRows, 1>(task, first, last, sums, stride);
        }
        finish(task, first, last, {sums, stride, 2 * kPanel});
    }
}

}  // namespace

FullyConnectedKernel fully_connected_f32() {
    return {prepared_bytes, prepare, multiply<F32>};
}

FullyConnectedKernel fully_connected_bf16() {
    return {prepared_bytes, prepare, multiply<Bf16>};
}

}  // namespace chatglm::avx2
