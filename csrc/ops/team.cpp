#include "ops/team.h"

#include <immintrin.h>
#include <tbb/task_arena.h>

#include <stdexcept>
#include <thread>
#include <utility>

namespace chatglm {
namespace {

// Fields of `left_`, from the lowest bit on: units, order, number of the loop.
constexpr int kOrderBit = 32;
constexpr uint64_t kUnits = (uint64_t{1} << kOrderBit) - 1, kOrder = uint64_t{1} << kOrderBit,
                   kLoop = uint64_t{1} << (kOrderBit + 1);

// Waits a little longer each time: a loop that starts at once is seen at once, and a core that other programs want is
// not kept from them.
class Patience {
public:
    void wait() {
        if (++waits_ < kSpins) {
            _mm_pause();
        } else {
            std::this_thread::yield();
        }
    }
    void renew() { waits_ = 0; }

private:
    static constexpr int kSpins = 2000;  // 20 to 70 us
    int waits_ = 0;
};

}  // namespace

Team::Team() : threads_(tbb::this_task_arena::max_concurrency()) {}

Team::~Team() {
    ended_.store(true, std::memory_order_relaxed);
    if (gathered_) helpers_.wait();
}

void Team::run(Order order, int64_t units, Call call, const void* body) {
    if (static_cast<uint64_t>(units) > kUnits) throw std::length_error("Team: too many pieces");
    if (!gathered_) {
        gathered_ = true;
        gather(1, threads_);
    }
    call_ = call;
    body_ = body;
    units_ = units;
    done_.store(0, std::memory_order_relaxed);
    const uint64_t loop = (left_.load(std::memory_order_relaxed) / kLoop + 1) * kLoop;
    left_.store(loop | static_cast<uint64_t>(order) << kOrderBit | static_cast<uint64_t>(units),
                std::memory_order_release);
    take_pieces();
    for (Patience patience; done_.load(std::memory_order_acquire) != units;) patience.wait();
    if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
}

// Asks for the threads [first, last); each that comes asks for a half of its own, so that many come soon.
void Team::gather(int64_t first, int64_t last) {
    while (first < last) {
        const int64_t middle = first + (last - first) / 2;
        helpers_.run([this, from = middle + 1, last] {
            gather(from, last);
            help();
        });
        last = middle;
    }
}

void Team::help() {
    Patience patience;
    while (!ended_.load(std::memory_order_relaxed)) {
        if (take_pieces()) patience.renew();
        patience.wait();
    }
}

bool Team::take_pieces() {
    bool any = false;
    uint64_t left = left_.load(std::memory_order_acquire);
    while (const auto units = static_cast<int64_t>(left & kUnits)) {
        const int64_t taken = left & kOrder ? std::max<int64_t>(1, units / (2 * threads_)) : 1;
        const uint64_t rest = left - static_cast<uint64_t>(taken);
        if (!left_.compare_exchange_weak(left, rest, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
        const int64_t first = units_ - units;
        try {
            call_(body_, first, first + taken);
        } catch (...) {
            const std::lock_guard<std::mutex> lock(failure_mutex_);
            if (!failure_) failure_ = std::current_exception();
        }
        done_.fetch_add(taken, std::memory_order_acq_rel);
        left = rest;
        any = true;
    }
    return any;
}

}  // namespace chatglm
