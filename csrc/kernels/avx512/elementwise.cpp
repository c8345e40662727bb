#include "kernels/elementwise-inl.h"
#include "kernels/levels.h"

namespace chatglm::avx512 {

ElementwiseKernel elementwise() {
    return {rms_norm, layer_norm, rotate};
}

}  // namespace chatglm::avx512
