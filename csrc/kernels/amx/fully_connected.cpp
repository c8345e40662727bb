// By the number of rows: the kernels of the levels below, or tiles.
#include "kernels/amx/fully_connected.h"

#include <stdexcept>

#include "kernels/amx/blocking.h"
#include "kernels/levels.h"

namespace chatglm::CHATGLM_AMX_LEVEL {
namespace {

FullyConnectedKernel for_few_rows(WeightFormat format) {
    return format == WeightFormat::bf16 ? avx512_bf16::fully_connected_bf16() : avx512::fully_connected(format);
}

FullyConnectedKernel for_many_rows(WeightFormat format) {
    switch (format) {
        case WeightFormat::bf16: return fully_connected_bf16();
        case WeightFormat::int8: return fully_connected_int8();
        case WeightFormat::int4: return fully_connected_int4();
        default: throw std::invalid_argument("format: f32, wanted one of bf16, int8, int4");
    }
}

template <WeightFormat kFormat>
const FullyConnectedKernel& choose(int64_t rows) {
    static const FullyConnectedKernel few = for_few_rows(kFormat), many = for_many_rows(kFormat);
    return rows < kLeastRows ? few : many;
}

template <WeightFormat kFormat>
int64_t prepared_bytes(const PackedLayout& layout, int64_t rows, int activation_bits) {
    return choose<kFormat>(rows).prepared_bytes(layout, rows, activation_bits);
}

template <WeightFormat kFormat>
void prepare(const PackedLayout& layout, int64_t rows, int activation_bits, const float* x, int64_t x_stride,
             int64_t begin, int64_t end, void* prepared) {
    choose<kFormat>(rows).prepare(layout, rows, activation_bits, x, x_stride, begin, end, prepared);
}

template <WeightFormat kFormat>
void multiply(const FullyConnectedTask& task, int64_t begin, int64_t end) {
    choose<kFormat>(task.rows).multiply(task, begin, end);
}

template <WeightFormat kFormat>
FullyConnectedKernel by_rows() {
    return {prepared_bytes<kFormat>, prepare<kFormat>, multiply<kFormat>};
}

}  // namespace

FullyConnectedKernel fully_connected(WeightFormat format) {
    switch (format) {
        case WeightFormat::bf16: return by_rows<WeightFormat::bf16>();
        case WeightFormat::int8: return by_rows<WeightFormat::int8>();
        default: return by_rows<WeightFormat::int4>();
    }
}

}  // namespace chatglm::CHATGLM_AMX_LEVEL
