// int8 weights: tiles of signed activations times the packed lines as they are.
//
// A step of 64 columns is 4 tile loads (16 lines each, half of them from L2) and 4 products of 16 cycles. A unit over a
// block of 512 columns is 32 products, 512 cycles. Beside them run, with 16 / 8 bits, 656 / 704 line loads (328 / 352
// cycles of two load ports), 96 / 128 line stores, and 192 vector operations (96 cycles of two ports; 6 for each of 32
// vectors, 3 for each of 64). Nothing but the products fills the time; what is lost goes to latencies, and to L2, which
// can hardly give a unit's 16 KB in 512 cycles.
#include "kernels/amx/fully_connected.h"
#include "kernels/amx/quantized.h"

namespace chatglm::CHATGLM_AMX_LEVEL {
namespace {

class Int8Weights {
public:
    static constexpr bool kUnsigned = true, kGrouped = false;

    explicit Int8Weights(const FullyConnectedTask& task) : layout_(task.layout), weight_(task.weight) {}

    int64_t group_columns(int64_t block_columns) const { return block_columns; }

    PairWeights load(const PairBlock& pair) const {
        return {{lines(pair, 0), lines(pair, pair.panels - 1)}, nullptr};
    }

    Prefetch prefetch(const PairBlock& pair, int64_t steps) const {
        if (pair.panels == 0) return {nullptr, nullptr, 0, 1};
        return {lines(pair, 0), lines(pair, pair.panels - 1), block_columns(layout_, pair.block) * kPanel, steps};
    }

private:
    const uint8_t* lines(const PairBlock& pair, int64_t panel) const {
        return layout_.panel(weight_, pair.panel + panel) + pair.block * kActivationBlock * kPanel;
    }

    const PackedLayout& layout_;
    const uint8_t* weight_;
};

void multiply(const FullyConnectedTask& task, int64_t begin, int64_t end) {
    if (task.activation_bits == 16) {
        multiply_quantized<Int8Weights, 2, 64>(task, begin, end);
    } else {
        multiply_quantized<Int8Weights, 1, 64>(task, begin, end);
    }
}

}  // namespace

FullyConnectedKernel fully_connected_int8() {
    return {prepared_bytes_quantized, prepare_quantized, multiply};
}

}  // namespace chatglm::CHATGLM_AMX_LEVEL
