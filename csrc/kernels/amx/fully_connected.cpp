// By the number of rows: the kernels of the levels below, or tiles.
#include "kernels/amx/fully_connected.h"

#include "kernels/amx/blocking.h"
#include "kernels/by_rows-inl.h"
#include "kernels/levels.h"

namespace chatglm::CHATGLM_AMX_LEVEL {
namespace {

FullyConnectedKernel for_few_rows(WeightFormat format) {
    switch (format) {
        case WeightFormat::bf16: return avx512_bf16::fully_connected_bf16();
        case WeightFormat::int8: return avx512::fully_connected_int8();
        default: return avx512::fully_connected_int4();
    }
}

FullyConnectedKernel for_many_rows(WeightFormat format) {
    switch (format) {
        case WeightFormat::bf16: return fully_connected_bf16();
        case WeightFormat::int8: return fully_connected_int8();
        default: return fully_connected_int4();
    }
}

template <WeightFormat kFormat>
const FullyConnectedKernel& choose(int64_t rows) {
    static const FullyConnectedKernel few = for_few_rows(kFormat), many = for_many_rows(kFormat);
    return rows < kLeastRows ? few : many;
}

}  // namespace

FullyConnectedKernel fully_connected(WeightFormat format) {
    switch (format) {
        case WeightFormat::bf16: return ByRows<choose<WeightFormat::bf16>>::kernel();
        case WeightFormat::int8: return ByRows<choose<WeightFormat::int8>>::kernel();
        default: return ByRows<choose<WeightFormat::int4>>::kernel();
    }
}

}  // namespace chatglm::CHATGLM_AMX_LEVEL
