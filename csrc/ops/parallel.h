// Work over the threads of the calling stream's arena.
#pragma once

#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace chatglm {

inline int64_t thread_count() {
    return tbb::this_task_arena::max_concurrency();
}

// Calls body(begin, end) for pieces of [0, count) that start at multiples of `step`: about `pieces_per_thread` for
// each thread, taken in turn, so that a core that is busy elsewhere does not decide the time.
template <typename Body>
void parallel_pieces(int64_t count, int64_t step, int64_t pieces_per_thread, const Body& body) {
    const int64_t steps = (count + step - 1) / step;
    const int64_t threads = thread_count();
    if (threads == 1 || steps <= 1) {
        if (count > 0) body(int64_t{0}, count);
        return;
    }
    const int64_t pieces = std::min(steps, threads * pieces_per_thread);
    tbb::parallel_for(
        tbb::blocked_range<int64_t>(0, pieces, 1),
        [&](const tbb::blocked_range<int64_t>& range) {
            for (int64_t i = range.begin(); i != range.end(); ++i) {
                const int64_t begin = steps * i / pieces * step, end = steps * (i + 1) / pieces * step;
                body(begin, std::min(end, count));
            }
        },
        tbb::simple_partitioner{});
}

// Calls body(begin, end) for pieces of [0, count) that start at multiples of `step`, the long ones first: a thread takes
// half of its part of what is left. So the threads end within about one step of each other, whatever disturbs them, and
// most of the time read long pieces.
template <typename Body>
void parallel_shrinking_pieces(int64_t count, int64_t step, const Body& body) {
    const int64_t steps = (count + step - 1) / step;
    const int64_t threads = thread_count();
    if (threads == 1 || steps <= 1) {
        if (count > 0) body(int64_t{0}, count);
        return;
    }
    std::atomic<int64_t> next{0};
    const auto take = [&](int) {
        for (int64_t begin = next; begin < steps; begin = next) {
            const int64_t end = begin + std::max<int64_t>(1, (steps - begin) / (2 * threads));
            if (next.compare_exchange_strong(begin, end)) body(begin * step, std::min(end * step, count));
        }
    };
    tbb::parallel_for(0, static_cast<int>(std::min(threads, steps)), take, tbb::simple_partitioner{});
}

}  // namespace chatglm
