#include "kernels/attention-inl.h"
#include "kernels/levels.h"

namespace chatglm::avx2 {

AttentionKernel attention() {
    return {append, attend, merge};
}

}  // namespace chatglm::avx2
