#include "kernels/fully_connected_vnni-inl.h"
#include "kernels/levels.h"

namespace chatglm::avx_vnni {

FullyConnectedKernel fully_connected_int8() {
    return {prepared_bytes, prepare<Int8>, multiply<Int8>};
}

FullyConnectedKernel fully_connected_int4() {
    return {prepared_bytes, prepare<Int4>, multiply<Int4>};
}

}  // namespace chatglm::avx_vnni
