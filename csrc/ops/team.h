// Work over the threads of the calling stream's arena.
#pragma once

#include <tbb/task_group.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>

namespace chatglm {

// The calling thread, and threads of its arena that stay with it from the first loop to the end of the team: a chain
// of operations is hundreds of loops, and to wake threads for each and to let them go takes more than a loop's own
// work where it is short.
//
// The caller waits for pieces that a thread has taken, never for a thread to come: where the arena has none to spare,
// it does everything itself. Between loops the others wait awake, so a team lives no longer than its caller is busy.
// Loops are started by the thread that made the team, one after the other, never inside each other.
class Team {
public:
    Team();
    ~Team();
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    int64_t threads() const { return threads_; }

    // Calls body(begin, end) for pieces of [0, count) that start at multiples of `step`: about `pieces_per_thread` for
    // each thread, taken one by one. Each thread has a part of them that lies together; one that is done takes from
    // others, so that a core that is busy elsewhere does not decide the time. Throws what a body threw first, after
    // the end of the loop: the other pieces are done all the same.
    template <typename Body>
    void pieces(int64_t count, int64_t step, int64_t pieces_per_thread, const Body& body) {
        const int64_t steps = (count + step - 1) / step;
        if (threads_ == 1 || steps <= 1) {
            if (count > 0) body(int64_t{0}, count);
            return;
        }
        const int64_t pieces = std::min(steps, threads_ * pieces_per_thread);
        run(Order::one_by_one, pieces, [&](int64_t first, int64_t last) {
            body(steps * first / pieces * step, std::min(steps * last / pieces * step, count));
        });
    }

    // The same with the long pieces first: a thread takes a quarter of what is left of its part. So the threads end
    // within about one step of each other, whatever disturbs them, and read long streams: a piece mostly begins where
    // the thread's last one ended.
    template <typename Body>
    void shrinking_pieces(int64_t count, int64_t step, const Body& body) {
        const int64_t steps = (count + step - 1) / step;
        if (threads_ == 1 || steps <= 1) {
            if (count > 0) body(int64_t{0}, count);
            return;
        }
        run(Order::shrinking, steps, [&](int64_t first, int64_t last) {
            body(first * step, std::min(last * step, count));
        });
    }

private:
    enum class Order { one_by_one, shrinking };
    using Call = void (*)(const void* body, int64_t first, int64_t last);

    template <typename Body>
    void run(Order order, int64_t units, const Body& body) {
        const auto call = [](const void* known, int64_t first, int64_t last) {
            (*static_cast<const Body*>(known))(first, last);
        };
        run(order, units, call, &body);
    }

    void run(Order order, int64_t units, Call call, const void* body);
    void gather(int64_t first, int64_t last);
    void help();
    bool take_pieces(int64_t thread);  // whether there were any

    // Units [first, last) of a loop.
    struct Range {
        int64_t first, last;
    };
    // What is left of a thread's part, in one word, from which its pieces and those that others take are cut off.
    struct alignas(64) Part {
        std::atomic<uint64_t> left{0};
    };
    Range take(int64_t thread);  // empty where nothing is left

    const int64_t threads_;
    tbb::task_group helpers_;
    std::unique_ptr<Part[]> parts_;  // from the first loop on
    std::atomic<int64_t> joined_{1};  // threads that have a part of their own: the caller the first one
    std::atomic<bool> ended_{false};

    // The loop; `call_` and `body_` stay as they are until all its units are done.
    alignas(64) std::atomic<int64_t> undone_{0};
    alignas(64) Call call_ = nullptr;
    const void* body_ = nullptr;
    std::mutex failure_mutex_;
    std::exception_ptr failure_;
};

}  // namespace chatglm
