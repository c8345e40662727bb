// FullyConnected of few rows: one panel after the other, from its first line to its last.
//
// What takes the time is reading the weights. A thread that reads one stream of them, its lines asked for far ahead,
// comes nearly to what the memory can deliver. With four panels side by side it is up to a fifth behind where several
// instructions meet each line.
//
// Included by kernels/<level>/fully_connected*.cpp only; everything here has internal linkage, see simd-inl.h.
#pragma once

#include "kernels/epilogue-inl.h"
#include "kernels/fully_connected-inl.h"

namespace chatglm {
namespace {

// How far ahead, measured: half of it is not enough where the memory is fast.
constexpr int64_t kStreamAhead = 8192;

// Inlined at once: a call of a function that only prefetches is removed by GCC 12 as one without effect.
[[gnu::always_inline]] inline void prefetch_stream(const uint8_t* line) {
    _mm_prefetch(line + kStreamAhead, _MM_HINT_T1);
}

// Panels that are finished together.
constexpr int64_t kStreamPanels = 8;
static_assert(kStreamPanels % 2 == 0, "a gate lies beside what it multiplies");
// Floats between the rows of their sums.
constexpr int64_t kStreamStride = kStreamPanels * kPanel;

// Calls stream(std::integral_constant<int, rows>(), panel, sums) for each panel, for the sums of its products:
// [row][16], rows kStreamStride floats apart. At most kMost rows.
template <int kMost, typename Stream>
void multiply_streams(const FullyConnectedTask& task, int64_t begin, int64_t end, const Stream& stream) {
    alignas(kLineBytes) float sums[kMost * kStreamStride];
    for (int64_t first = begin; first < end; first += kStreamPanels) {
        const int64_t last = std::min(first + kStreamPanels, end);
        with_rows<kMost>(task.rows, [&](auto rows) {
            for (int64_t panel = first; panel < last; ++panel) stream(rows, panel, sums + (panel - first) * kPanel);
        });
        finish(task, first, last, {sums, kStreamStride, 2 * kPanel});
    }
}

}  // namespace
}  // namespace chatglm
