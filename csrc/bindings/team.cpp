// Loops of a team, for tests.
#include <tbb/task_arena.h>

#include <atomic>
#include <memory>
#include <stdexcept>
#include <string>

#include "bindings.h"
#include "ops/team.h"

namespace nb = nanobind;

namespace chatglm {
namespace {

// Runs `loops` loops over [0, count) with one team and adds to visits what each index was visited.
void run_loops(int threads, int64_t loops, int64_t step, bool shrinking, std::optional<int64_t> fail_at,
               MutableArray<int32_t, 1> visits) {
    const auto count = static_cast<int64_t>(visits.size());
    const std::unique_ptr<std::atomic<int32_t>[]> seen(new std::atomic<int32_t>[visits.size()]());
    const auto body = [&](int64_t begin, int64_t end) {
        if (begin % step != 0 || begin >= end || end > count) throw std::logic_error("a piece that is none");
        for (int64_t i = begin; i < end; ++i) {
            if (fail_at && i == *fail_at) throw std::runtime_error("failed at " + std::to_string(i));
            ++seen[static_cast<size_t>(i)];
        }
    };
    tbb::task_arena arena(threads);
    arena.execute([&] {
        Team team;
        for (int64_t loop = 0; loop < loops; ++loop) {
            shrinking ? team.shrinking_pieces(count, step, body) : team.pieces(count, step, 3, body);
        }
    });
    for (size_t i = 0; i < visits.size(); ++i) visits.data()[i] += seen[i];
}

}  // namespace

void bind_team(nb::module_& module) {
    module.def(
        "run_loops",
        [](int threads, int64_t loops, int64_t step, bool shrinking, std::optional<int64_t> fail_at,
           MutableArray<int32_t, 1> visits) {
            if (threads < 1 || step < 1) throw nb::value_error("threads and step must be positive");
            nb::gil_scoped_release unlocked;
            run_loops(threads, loops, step, shrinking, fail_at, visits);
        },
        nb::arg("threads"), nb::arg("loops"), nb::arg("step"), nb::arg("shrinking"), nb::arg("fail_at").none(),
        nb::arg("visits"),
        "Runs so many loops over the indices of visits int32 [n] with one team, in pieces that start at multiples of "
        "step, and adds to visits how often each index was visited. Raises RuntimeError at the index fail_at.");
}

}  // namespace chatglm
