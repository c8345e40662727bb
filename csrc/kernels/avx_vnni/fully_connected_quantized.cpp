#include "kernels/fully_connected_vnni-inl.h"
#include "kernels/levels.h"

// No processor of prefers_page_reach has these instructions.
namespace chatglm::avx_vnni {

FullyConnectedKernel fully_connected_int8() {
    return kernel<Int8, FarReach>();
}

FullyConnectedKernel fully_connected_int4() {
    return kernel<Int4, FarReach>();
}

}  // namespace chatglm::avx_vnni
