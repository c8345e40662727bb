// Work over the threads of the calling stream's arena.
#pragma once

#include <tbb/task_group.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
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
    // each thread, taken in turn, so that a core that is busy elsewhere does not decide the time. Throws what a body
    // threw first, after the end of the loop: the other pieces are done all the same.
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

    // The same with the long pieces first: a thread takes half of its part of what is left. So the threads end within
    // about one step of each other, whatever disturbs them, and most of the time read long pieces.
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
    enum class Order : uint64_t { one_by_one, shrinking };
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
    bool take_pieces();  // whether there were any

    const int64_t threads_;
    tbb::task_group helpers_;
    bool gathered_ = false;
    std::atomic<bool> ended_{false};

    // What is left of the loop: its number, its order and the units that nobody has taken, in one word. A piece is
    // taken by making the last of these smaller, which fails once the loop is another one; `call_`, `body_` and
    // `units_` stay as they are until all pieces that were taken are done.
    alignas(64) std::atomic<uint64_t> left_{0};
    alignas(64) std::atomic<int64_t> done_{0};
    alignas(64) Call call_ = nullptr;
    const void* body_ = nullptr;
    int64_t units_ = 0;
    std::mutex failure_mutex_;
    std::exception_ptr failure_;
};

}  // namespace chatglm
