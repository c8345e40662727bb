#include "kernels/attention-inl.h"
#include "kernels/levels.h"

namespace chatglm::avx512 {

AttentionKernel attention() {
    return {append, attend, merge};
}

}  // namespace chatglm::avx512
