#include "kernels/levels.h"

namespace chatglm {
namespace {

// A table with the kernels in it that use tiles.
KernelTable with_tiles(const char* name, KernelTable level, FullyConnectedKernel (*fully_connected)(WeightFormat),
                       AttentionKernel attention) {
    level.level = name;
    level.attention = attention;
    for (WeightFormat format : {WeightFormat::bf16, WeightFormat::int8, WeightFormat::int4}) {
        level.fully_connected[static_cast<int>(format)] = fully_connected(format);
    }
    return level;
}

}  // namespace

namespace avx2 {
const KernelTable& table() {
    static const KernelTable table{
        "avx2",
        {fully_connected_f32(), fully_connected_bf16(), fully_connected_int8(), fully_connected_int4()},
        attention(),
        elementwise(),
        limit()};
    return table;
}
}  // namespace avx2

namespace avx_vnni {
const KernelTable& table() {
    static const KernelTable table = [] {
        KernelTable level = avx2::table();
        level.level = "avx_vnni";
        level.fully_connected[static_cast<int>(WeightFormat::int8)] = fully_connected_int8();
        level.fully_connected[static_cast<int>(WeightFormat::int4)] = fully_connected_int4();
        level.limit = limit();
        return level;
    }();
    return table;
}
}  // namespace avx_vnni

namespace avx512 {
const KernelTable& table() {
    static const KernelTable table{
        "avx512",
        {fully_connected_f32(), fully_connected_bf16(), fully_connected_int8(), fully_connected_int4()},
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
        level.level = "avx512_bf16";
        level.fully_connected[static_cast<int>(WeightFormat::bf16)] = fully_connected_bf16();
        level.attention = attention();
        level.limit = limit();
        return level;
    }();
    return table;
}
}  // namespace avx512_bf16

namespace amx {
const KernelTable& table() {
    static const KernelTable table = [] {
        KernelTable level = with_tiles("amx", avx512_bf16::table(), fully_connected, attention());
        level.limit = limit();
        return level;
    }();
    return table;
}
}  // namespace amx

namespace amx_emulated {
const KernelTable& table() {
    static const KernelTable table = with_tiles("amx_emulated", avx512_bf16::table(), fully_connected, attention());
    return table;
}
}  // namespace amx_emulated

}  // namespace chatglm
