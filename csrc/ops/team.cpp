#include "ops/team.h"

#include <immintrin.h>
#include <tbb/task_arena.h>

#include <stdexcept>
#include <thread>
#include <utility>

namespace chatglm {
namespace {

// What is left of a part in one word, from the lowest bit on: its first unit, the unit behind it, its order.
constexpr int kLastBit = 31, kOrderBit = 62;
constexpr uint64_t kUnit = (uint64_t{1} << kLastBit) - 1;

uint64_t packed(int64_t first, int64_t last, bool shrinking) {
    return static_cast<uint64_t>(shrinking) << kOrderBit | static_cast<uint64_t>(last) << kLastBit |
           static_cast<uint64_t>(first);
}

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
    if (parts_) helpers_.wait();
}

void Team::run(Order order, int64_t units, Call call, const void* body) {
    if (static_cast<uint64_t>(units) > kUnit) throw std::length_error("Team: too many pieces");
    if (!parts_) {
        parts_ = std::make_unique<Part[]>(static_cast<size_t>(threads_));
        gather(1, threads_);
    }
    call_ = call;
    body_ = body;
    undone_.store(units, std::memory_order_release);
    for (int64_t i = 0; i < threads_; ++i) {
        const uint64_t part =
            packed(units * i / threads_, units * (i + 1) / threads_, order == Order::shrinking);
        parts_[static_cast<size_t>(i)].left.store(part, std::memory_order_release);
    }
    for (Patience patience; undone_.load(std::memory_order_acquire) > 0; patience.wait()) take_pieces(0);
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
    const int64_t thread = joined_.fetch_add(1, std::memory_order_relaxed);
    Patience patience;
    while (!ended_.load(std::memory_order_relaxed)) {
        if (undone_.load(std::memory_order_acquire) > 0 && take_pieces(thread)) patience.renew();
        patience.wait();
    }
}

bool Team::take_pieces(int64_t thread) {
    bool any = false;
    while (true) {
        const Range units = take(thread);
        if (units.first == units.last) return any;
        try {
            call_(body_, units.first, units.last);
        } catch (...) {
            const std::lock_guard<std::mutex> lock(failure_mutex_);
            if (!failure_) failure_ = std::current_exception();
        }
        undone_.fetch_sub(units.last - units.first, std::memory_order_acq_rel);
        any = true;
    }
}

// From the beginning of the thread's own part, or else from the end of the next one that is not empty.
Team::Range Team::take(int64_t thread) {
    for (int64_t i = 0; i < threads_; ++i) {
        std::atomic<uint64_t>& left = parts_[static_cast<size_t>((thread + i) % threads_)].left;
        uint64_t seen = left.load(std::memory_order_acquire);
        while (true) {
            const auto first = static_cast<int64_t>(seen & kUnit);
            const auto last = static_cast<int64_t>(seen >> kLastBit & kUnit);
            if (first == last) break;
            const bool shrinking = seen >> kOrderBit;
            const int64_t count = shrinking ? std::max<int64_t>(1, (last - first) / 4) : 1;
            const Range taken = i == 0 ? Range{first, first + count} : Range{last - count, last};
            const uint64_t rest =
                i == 0 ? packed(first + count, last, shrinking) : packed(first, last - count, shrinking);
            // Succeeds only if the word is what was seen. Should it be the same again by then, in a later loop even,
            // what is taken is left of that one all the same, and its call is read behind this.
            if (left.compare_exchange_weak(seen, rest, std::memory_order_acq_rel, std::memory_order_acquire)) {
                return taken;
            }
        }
    }
    return {0, 0};
}

}  // namespace chatglm
