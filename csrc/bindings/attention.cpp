// The attention and elementwise kernels of a level, for tests.
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <tuple>

#include "bindings.h"
#include "kernels/table.h"

namespace nb = nanobind;

namespace chatglm {
namespace {

using FloatArray = nb::ndarray<nb::numpy, float>;

CacheType parse_cache_type(const std::string& name) {
    if (name == "f32") return CacheType::f32;
    if (name == "bf16") return CacheType::bf16;
    if (name == "int8") return CacheType::int8;
    throw std::invalid_argument("cache type: '" + name + "', wanted one of f32, bf16, int8");
}

CacheLayout layout_of(const std::string& type, int64_t kv_heads, int64_t head_dim) {
    if (kv_heads < 1 || head_dim < 1) throw std::invalid_argument("cache: kv_heads and head_dim must be positive");
    return {parse_cache_type(type), kv_heads, head_dim};
}

void check(bool fits, const char* function) {
    if (!fits) throw std::invalid_argument(std::string(function) + ": arrays do not fit");
}

template <typename T>
int64_t size_of(const T& array) {
    return static_cast<int64_t>(array.size());
}

FloatArray new_array(std::initializer_list<size_t> shape) {
    size_t size = 1;
    for (size_t n : shape) size *= n;
    auto* data = new float[size];
    return FloatArray(data, shape, nb::capsule(data, [](void* p) noexcept { delete[] static_cast<float*>(p); }));
}

void append(const std::string& isa, const std::string& type, int64_t head_dim, MutableArray<uint8_t, 1> block,
            int64_t slot, Array<float, 1> key, Array<float, 1> value) {
    const CacheLayout layout = layout_of(type, 1, head_dim);
    check(size_of(block) == layout.block_bytes() && slot >= 0 && slot < kBlockSlots && size_of(key) == head_dim &&
              size_of(value) == head_dim,
          "append");
    kernels_by_name(isa).attention.append(layout, block.data(), slot, key.data(), value.data());
}

std::tuple<FloatArray, FloatArray, FloatArray> attend(const std::string& isa, const std::string& type,
                                                      int64_t head_dim, Array<float, 2> query,
                                                      Array<int64_t, 1> visible, Array<uint8_t, 2> blocks,
                                                      int64_t begin, int64_t end) {
    const CacheLayout layout = layout_of(type, 1, head_dim);
    const auto rows = static_cast<int64_t>(query.shape(0));
    const int64_t padded = layout.padded_dim();
    check(rows >= 1 && rows <= kTileRows && static_cast<int64_t>(query.shape(1)) == head_dim &&
              size_of(visible) == rows && static_cast<int64_t>(blocks.shape(1)) == layout.block_bytes() &&
              begin >= 0 && begin % kBlockSlots == 0 && begin <= end &&
              end <= static_cast<int64_t>(blocks.shape(0)) * kBlockSlots,
          "attend");
    std::vector<float> padded_query(static_cast<size_t>(rows * padded)), context(padded_query.size());
    for (int64_t row = 0; row < rows; ++row) {
        std::copy_n(query.data() + row * head_dim, head_dim, padded_query.data() + row * padded);
    }
    std::vector<const uint8_t*> pointers;
    for (size_t i = 0; i < blocks.shape(0); ++i) pointers.push_back(blocks.data() + i * blocks.shape(1));
    const auto count = static_cast<size_t>(rows);
    FloatArray result = new_array({count, static_cast<size_t>(head_dim)}), max = new_array({count});
    FloatArray sum = new_array({count});
    kernels_by_name(isa).attention.attend({layout, rows, padded_query.data(), visible.data(), pointers.data(),
                                              begin, end, end, context.data(), max.data(), sum.data()});
    for (int64_t row = 0; row < rows; ++row) {
        std::copy_n(context.data() + row * padded, head_dim, result.data() + row * head_dim);
    }
    return {result, max, sum};
}

std::tuple<float, float> merge(const std::string& isa, Array<float, 1> context, float max, float sum,
                               MutableArray<float, 1> into_context, float into_max, float into_sum) {
    check(context.size() == into_context.size(), "merge");
    kernels_by_name(isa).attention.merge(size_of(context), context.data(), max, sum, into_context.data(), &into_max,
                                            &into_sum);
    return {into_max, into_sum};
}

void bind_cache_layout(nb::module_& module) {
    module.attr("BLOCK_SLOTS") = kBlockSlots;
    nb::class_<CacheLayout>(module, "CacheLayout", "Sizes of the KV cache, in bytes; csrc/kernels/cache_layout.h.")
        .def("__init__",
             [](CacheLayout* self, const std::string& type, int64_t kv_heads, int64_t head_dim) {
                 new (self) CacheLayout(layout_of(type, kv_heads, head_dim));
             },
             nb::arg("type"), nb::arg("kv_heads"), nb::arg("head_dim"))
        .def_ro("kv_heads", &CacheLayout::kv_heads)
        .def_ro("head_dim", &CacheLayout::head_dim)
        .def_prop_ro("padded_dim", &CacheLayout::padded_dim)
        .def_prop_ro("block_bytes", &CacheLayout::block_bytes)
        .def_prop_ro("value_offset", &CacheLayout::value_offset)
        .def_prop_ro("key_scale_offset", &CacheLayout::key_scale_offset)
        .def_prop_ro("value_scale_offset", &CacheLayout::value_scale_offset)
        .def("key_index", &CacheLayout::key_index, nb::arg("slot"), nb::arg("d"),
             "Index, in elements of the key part, of a dim of a slot 0..31.")
        .def("value_index", &CacheLayout::value_index, nb::arg("slot"), nb::arg("d"),
             "Index, in elements of the value part, of a dim of a slot 0..31.");
}

void bind_elementwise(nb::module_& module) {
    module.def(
        "rms_norm",
        [](const std::string& isa, Array<float, 1> x, Array<float, 1> weight, float eps, MutableArray<float, 1> y) {
            check(x.size() == weight.size() && x.size() == y.size(), "rms_norm");
            kernels_by_name(isa).elementwise.rms_norm(x.data(), weight.data(), eps, size_of(x), y.data());
        },
        nb::arg("isa"), nb::arg("x"), nb::arg("weight"), nb::arg("eps"), nb::arg("y"),
        "y = x / sqrt(mean(x^2) + eps) * weight, all float32 [n].");
    module.def(
        "layer_norm",
        [](const std::string& isa, Array<float, 1> x, Array<float, 1> weight, Array<float, 1> bias, float eps,
           MutableArray<float, 1> y) {
            check(x.size() == weight.size() && x.size() == bias.size() && x.size() == y.size(), "layer_norm");
            kernels_by_name(isa)
                .elementwise.layer_norm(x.data(), weight.data(), bias.data(), eps, size_of(x), y.data());
        },
        nb::arg("isa"), nb::arg("x"), nb::arg("weight"), nb::arg("bias"), nb::arg("eps"), nb::arg("y"),
        "y = (x - mean) / sqrt(variance + eps) * weight + bias, all float32 [n].");
    module.def(
        "rotate",
        [](const std::string& isa, Array<float, 1> x, Array<float, 1> cos, Array<float, 1> sin, float scale,
           MutableArray<float, 1> y) {
            check(cos.size() == sin.size() && 2 * cos.size() <= x.size() && x.size() == y.size(), "rotate");
            kernels_by_name(isa)
                .elementwise.rotate(x.data(), cos.data(), sin.data(), size_of(cos), size_of(x), scale, y.data());
        },
        nb::arg("isa"), nb::arg("x"), nb::arg("cos"), nb::arg("sin"), nb::arg("scale"), nb::arg("y"),
        "Rotate-half of x [head_dim] by cos, sin [half] into y [head_dim], times scale.");
}

}  // namespace

void bind_attention(nb::module_& module) {
    bind_cache_layout(module);
    bind_elementwise(module);
    module.def("append", &append, nb::arg("isa"), nb::arg("cache_type"), nb::arg("head_dim"), nb::arg("block"),
               nb::arg("slot"), nb::arg("key"), nb::arg("value"),
               "Writes key and value [head_dim] of a token into slot 0..31 of a block u8 [block_bytes].");
    module.def("attend", &attend, nb::arg("isa"), nb::arg("cache_type"), nb::arg("head_dim"), nb::arg("query"),
               nb::arg("visible"), nb::arg("blocks"), nb::arg("begin"), nb::arg("end"),
               "Attention of query [rows, head_dim], taken as it is, over the slots [begin, end) of blocks u8 "
               "[n, block_bytes]; row r sees the slots before visible[r]. Returns (context [rows, head_dim], max "
               "[rows], sum [rows]) as AttentionTile in csrc/kernels/table.h.");
    module.def("merge", &merge, nb::arg("isa"), nb::arg("context"), nb::arg("max"), nb::arg("sum"),
               nb::arg("into_context"), nb::arg("into_max"), nb::arg("into_sum"),
               "Folds a partial result into another, in place for the context. Returns the new (max, sum).");
}

}  // namespace chatglm
