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

// The smallest page of memory, which the file of the weights lies in where its file system has no larger ones.
constexpr int64_t kPageBytes = 4096;

// How a stream is asked for ahead of where it is read.
// Measured on Zen 5: into the second-level cache; half of the distance is not enough where the memory is fast.
struct FarReach {
    static constexpr int64_t kBytes = 8192;
    static constexpr auto kHint = _MM_HINT_T1;
};
// Where few instructions meet a line, on processors of prefers_page_reach (isa.h). Measured on Zen 4, as a share of what
// a core can read, one row: int8 93 % where FarReach has 73, bf16 95 and 75, int4 85 and 80; at 3072 to 6144 bytes up to
// 7 % less. Two rows of int8: 86 and 73 % of what two cores read. Four are the other way round, 66 and 86 %: presumably
// what was brought so near does not stay until it is met.
struct PageReach {
    static constexpr int64_t kBytes = kPageBytes;
    static constexpr auto kHint = _MM_HINT_NTA;
};

// few: whether few instructions meet a line.
template <typename Reach, bool few>
using ReachFor = std::conditional_t<few, Reach, FarReach>;

// PageReach asks for one line of each page a page earlier still: presumably it is too near for a page whose address is
// yet to be translated. In pages of 4 KB bf16 reads at 94 % of a core's limit with it and 84 without, int8 and int4 as
// without it (FarReach: int8 86 to 90, int4 95 to 97); in large pages nothing changes.
//
// Inlined at once: a call of a function that only prefetches is removed by GCC 12 as one without effect.
template <typename Reach>
[[gnu::always_inline]] inline void prefetch_stream(const uint8_t* line) {
    _mm_prefetch(line + Reach::kBytes, Reach::kHint);
    if constexpr (std::is_same_v<Reach, PageReach>) {
        const bool starts_page = reinterpret_cast<uintptr_t>(line) % kPageBytes == 0;
        if (starts_page) _mm_prefetch(line + 2 * kPageBytes, _MM_HINT_T1);
    }
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
        prefetch_scales(task, first, last);
        with_rows<kMost>(task.rows, [&](auto rows) {
            for (int64_t panel = first; panel < last; ++panel) stream(rows, panel, sums + (panel - first) * kPanel);
        });
        finish(task, first, last, {sums, kStreamStride, 2 * kPanel});
    }
}

}  // namespace
}  // namespace chatglm
