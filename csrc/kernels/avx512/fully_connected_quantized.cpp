#include "kernels/avx512/fully_connected.h"
#include "kernels/fully_connected_vnni-inl.h"

namespace chatglm::avx512 {

FullyConnectedKernel fully_connected_int8() {
    return {prepared_bytes, prepare<Int8>, multiply<Int8>};
}

FullyConnectedKernel fully_connected_int4() {
    return {prepared_bytes, prepare<Int4>, multiply<Int4>};
}

}  // namespace chatglm::avx512
