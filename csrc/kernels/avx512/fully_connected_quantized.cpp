#include "kernels/fully_connected_vnni-inl.h"
#include "kernels/levels.h"

namespace chatglm::avx512 {

FullyConnectedKernel fully_connected_int8() {
    return prefers_page_reach() ? kernel<Int8, PageReach>() : kernel<Int8, FarReach>();
}

FullyConnectedKernel fully_connected_int4() {
    return prefers_page_reach() ? kernel<Int4, PageReach>() : kernel<Int4, FarReach>();
}

}  // namespace chatglm::avx512
