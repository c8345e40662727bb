#include <tbb/blocked_range.h>
#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <string>

#include "bindings.h"
#include "kernels/table.h"

namespace nb = nanobind;

namespace chatglm {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

// Each thread starts with one contiguous part; one that falls behind gives blocks of it away.
double read_bandwidth(const KernelTable& table, const uint8_t* data, int64_t bytes, int threads) {
    constexpr int64_t kBlock = 1 << 20;
    const tbb::blocked_range<int64_t> blocks(0, (bytes + kBlock - 1) / kBlock);
    tbb::task_arena arena(threads);
    arena.initialize();
    const auto start = Clock::now();
    arena.execute([&] {
        tbb::parallel_for(blocks, [&](const tbb::blocked_range<int64_t>& range) {
            const int64_t end = std::min(range.end() * kBlock, bytes);
            table.limit.read(data + range.begin() * kBlock, end - range.begin() * kBlock);
        });
    });
    return static_cast<double>(bytes) / seconds_since(start) / 1e9;
}

double peak(double (*operations)(int64_t), int threads, double seconds) {
    constexpr int64_t kIterations = 10000;
    std::atomic<double> total{0.0};
    tbb::task_arena arena(threads);
    arena.initialize();
    const auto start = Clock::now();
    arena.execute([&] {
        tbb::parallel_for(
            0, threads,
            [&](int) {
                double done = 0.0;
                // Once at least: a thread may come late.
                do {
                    done += operations(kIterations);
                } while (seconds_since(start) < seconds);
                for (double seen = total; !total.compare_exchange_weak(seen, seen + done);) {
                }
            },
            tbb::simple_partitioner());
    });
    return total / seconds_since(start);
}

void check_threads(int threads) {
    if (threads < 1) throw nb::value_error(("threads: " + std::to_string(threads) + ", wanted at least 1").c_str());
}

}  // namespace

void bind_limit(nb::module_& module) {
    module.def(
        "read_bandwidth",
        [](const std::string& isa, Array<uint8_t, 1> buffer, int threads) {
            check_threads(threads);
            const KernelTable& table = kernels_by_name(isa);
            nb::gil_scoped_release unlocked;
            return read_bandwidth(table, buffer.data(), static_cast<int64_t>(buffer.size()), threads);
        },
        nb::arg("isa"), nb::arg("buffer"), nb::arg("threads"),
        "GB/s of one pass of `threads` threads over buffer u8 [n], which should be larger than the caches.");
    module.def(
        "peak",
        [](const std::string& isa, const std::string& kind, int threads, double seconds) {
            check_threads(threads);
            const LimitKernel& limit = kernels_by_name(isa).limit;
            if (kind != "int8" && kind != "bf16") {
                throw nb::value_error(("kind: '" + kind + "', wanted int8 or bf16").c_str());
            }
            nb::gil_scoped_release unlocked;
            return peak(kind == "int8" ? limit.int8_operations : limit.bf16_operations, threads, seconds);
        },
        nb::arg("isa"), nb::arg("kind"), nb::arg("threads"), nb::arg("seconds"),
        "Operations per second (2 a multiply-add) of `threads` threads from registers, with the instructions that the "
        "level's kernels of kind int8 or bf16 use.");
}

}  // namespace chatglm
