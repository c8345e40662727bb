#include "kernels/levels.h"

namespace chatglm {

namespace avx2 {
const KernelTable& table() {
    static const KernelTable table{Isa::avx2,
                                   {fully_connected(WeightFormat::f32), fully_connected(WeightFormat::bf16),
                                    fully_connected(WeightFormat::int8), fully_connected(WeightFormat::int4)},
                                   attention(),
                                   elementwise(),
                                   limit()};
    return table;
}
}  // namespace avx2

namespace avx512 {
const KernelTable& table() {
    static const KernelTable table{Isa::avx512,
                                   {fully_connected(WeightFormat::f32), fully_connected(WeightFormat::bf16),
                                    fully_connected(WeightFormat::int8), fully_connected(WeightFormat::int4)},
                                   attention(),
                                   elementwise(),
                                   limit()};
    return table;
}
}  // namespace avx512

namespace avx512_bf16 {
const KernelTable& table() {
    static const KernelTable table = [] {
        KernelTable level = avx512::table();
        level.isa = Isa::avx512_bf16;
        level.fully_connected[static_cast<int>(WeightFormat::bf16)] = fully_connected_bf16();
        level.limit = limit();
        return level;
    }();
    return table;
}
}  // namespace avx512_bf16

namespace amx {
const KernelTable& table() {
    static const KernelTable table = [] {
        KernelTable level = avx512_bf16::table();
        level.isa = Isa::amx;
        level.limit = limit();
        return level;
    }();
    return table;
}
}  // namespace amx

}  // namespace chatglm
