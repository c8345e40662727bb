#include "ops/fully_connected_run.h"

#include "kernels/memory.h"

namespace chatglm {
namespace {

// Panels of the shortest piece; even: a gate lies beside what it multiplies. Where a thread has few panels, shorter
// pieces divide more evenly: of 256, 4 at a time, 48 threads have 1.33 pieces each, so that some take twice as long as
// others.
int64_t least_panels(int64_t panels, int64_t threads) {
    return panels < 16 * threads ? 2 : 4;
}

void run_rows(const KernelTable& table, const FullyConnectedCall& call, int64_t begin, int64_t rows, Team& team) {
    static thread_local Scratch scratch, normed;
    const FullyConnectedKernel& kernel = table.fully_connected[static_cast<int>(call.layout.format)];
    uint8_t* prepared = scratch.get<uint8_t>(kernel.prepared_bytes(call.layout, rows, call.activation_bits));
    const int64_t columns = call.layout.in_features;
    const float* x = call.x + begin * columns;
    float* normal = call.norm.weight == nullptr ? nullptr : normed.get<float>(rows * columns);
    team.pieces(rows, 1, 1, [&](int64_t first, int64_t last) {
        for (int64_t i = first; normal != nullptr && i < last; ++i) {
            call.norm.apply(table.elementwise, x + i * columns, columns, normal + i * columns);
        }
        const float* rows_of_x = normal == nullptr ? x : normal;
        kernel.prepare(call.layout, rows, call.activation_bits, rows_of_x, columns, first, last, prepared);
    });
    FullyConnectedTask task{call.layout, call.weight, rows, call.activation_bits, prepared, call.epilogue,
                            call.y + begin * call.y_features, call.y_features, call.y_features};
    if (task.epilogue.residual != nullptr) {
        task.epilogue.residual += begin * task.epilogue.residual_stride;
    }
    const int64_t panels = call.layout.panels();
    team.shrinking_pieces(panels, least_panels(panels, team.threads()),
                          [&](int64_t first, int64_t last) { kernel.multiply(task, first, last); });
}

}  // namespace

void run_fully_connected(const KernelTable& table, const FullyConnectedCall& call, Team& team) {
    for (int64_t begin = 0; begin < call.rows; begin += kMaxRows) {
        run_rows(table, call, begin, std::min(kMaxRows, call.rows - begin), team);
    }
}

}  // namespace chatglm
