#include "kernels/avx2/fully_connected.h"

#include "kernels/levels.h"

namespace chatglm::avx2 {

FullyConnectedKernel fully_connected(WeightFormat format) {
    switch (format) {
        case WeightFormat::f32: return fully_connected_f32();
        case WeightFormat::bf16: return fully_connected_bf16();
        case WeightFormat::int8: return fully_connected_int8();
        default: return fully_connected_int4();
    }
}

}  // namespace chatglm::avx2
