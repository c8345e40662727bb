// int8 weights: tiles of signed activations times the packed lines as they are.
//
// A step of 64 columns is 4 tile loads (16 lines each, half of them from L2) and 4 products of 16 cycles. A unit over a
// block of 512 columns is 32 products, 512 cycles. Beside them run, with 16 / 8 bits, 640 / 704 line loads (320 / 352
// cycles of two load ports), 96 / 128 line stores, and 160 / 192 vector operations (80 / 96 cycles of two ports; 5 for
// each of 32 vectors, 3 for each of 64). Nothing but the products fills the time; what is lost goes to latencies, and
// to L2, which can hardly give a unit's 16 KB in 512 cycles.
#include "kernels/amx/fully_connected.h"
#include "kernels/amx/products_int8.h"

namespace chatglm::CHATGLM_AMX_LEVEL {
namespace {

void multiply(const FullyConnectedTask& task, int64_t begin, int64_t end) {
    if (task.activation_bits == 16) {
        multiply_quantized<2, true, MappedWeights>(task, begin, end);
    } else {
        multiply_quantized<1, true, MappedWeights>(task, begin, end);
    }
}

}  // namespace

FullyConnectedKernel fully_connected_int8() {
    return {prepared_bytes_quantized, prepare_quantized, multiply};
}

}  // namespace chatglm::CHATGLM_AMX_LEVEL
