// bf16 weights: the packed lines as they are.
#include "kernels/amx/fully_connected.h"
#include "kernels/amx/products_bf16.h"

namespace chatglm::CHATGLM_AMX_LEVEL {

FullyConnectedKernel fully_connected_bf16() {
    return {prepared_bytes_bf16, prepare_bf16, multiply_bf16<MappedWeights>};
}

}  // namespace chatglm::CHATGLM_AMX_LEVEL
