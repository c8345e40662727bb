#include "ops/multi_head_attention.h"

#include <cstring>

#include "ops/attention_run.h"

namespace chatglm {
namespace {

// Products of three numbers up to this are far from the end of int64.
constexpr int64_t kMostHeads = 1 << 20;

enum Input : size_t { kQkv, kCos, kSin, kTable, kSlots, kVisible, kCopied, kCache, kInputs };

}  // namespace

void MultiHeadAttention::validate_and_infer_types() {
    check_version();
    check_inputs(kInputs);
    for (int64_t size : {num_attention_heads_, num_key_value_heads_, head_dim_}) {
        OPENVINO_ASSERT(size > 0 && size <= kMostHeads, "MultiHeadAttention: ", num_attention_heads_, " heads, ",
                        num_key_value_heads_, " of keys and values, of ", head_dim_, " dims, wanted 1 to ", kMostHeads);
    }
    OPENVINO_ASSERT(num_attention_heads_ % num_key_value_heads_ == 0, "MultiHeadAttention: ", num_attention_heads_,
                    " heads, wanted a multiple of num_key_value_heads ", num_key_value_heads_);
    for (size_t i : {kQkv, kCos, kSin}) {
        check_type(i, ov::element::f32);
        check_rank(i, 3);
    }
    for (size_t i : {kTable, kSlots, kVisible}) {
        check_type(i, ov::element::i32);
        check_rank(i, 2);
    }
    check_type(kCopied, ov::element::i32);
    check_rank(kCopied, 1);
    check_type(kCache, ov::element::u8);
    check_rank(kCache, 4);
    check_last_dim(kQkv, (num_attention_heads_ + 2 * num_key_value_heads_) * head_dim_);
    set_output_type(0, ov::element::f32, output_shape(get_input_partial_shape(kQkv), {}));
    if (!in_place_) {
        set_output_type(1, ov::element::u8, get_input_partial_shape(kCache));
    }
}

ov::PartialShape MultiHeadAttention::output_shape(ov::PartialShape qkv, const KnownNumber&) const {
    if (qkv.rank().is_static()) qkv[2] = num_attention_heads_ * head_dim_;
    return qkv;
}

bool MultiHeadAttention::visit_attributes(ov::AttributeVisitor& visitor) {
    visitor.on_attribute("num_attention_heads", num_attention_heads_);
    visitor.on_attribute("num_key_value_heads", num_key_value_heads_);
    visitor.on_attribute("head_dim", head_dim_);
    visitor.on_attribute("in_place", in_place_);
    return Operation::visit_attributes(visitor);
}

// What a graph that was changed, or an input that is wrong, would have the kernels read and write out of bounds.
void MultiHeadAttention::check_shapes(const ov::TensorVector& inputs) const {
    const ov::Shape &qkv = inputs[kQkv].get_shape(), &cos = inputs[kCos].get_shape();
    const int64_t features = (num_attention_heads_ + 2 * num_key_value_heads_) * head_dim_;
    const ov::Shape of_tokens{qkv[0], qkv[1]};
    OPENVINO_ASSERT(static_cast<int64_t>(qkv[2]) == features, "MultiHeadAttention: qkv of ", qkv, ", wanted ", features,
                    " features");
    OPENVINO_ASSERT(cos.size() == 3 && cos[0] == qkv[0] && cos[1] == qkv[1] && inputs[kSin].get_shape() == cos &&
                        2 * static_cast<int64_t>(cos[2]) <= head_dim_,
                    "MultiHeadAttention: angles of ", cos, " and ", inputs[kSin].get_shape(), ", wanted those of ",
                    of_tokens, " tokens and at most ", head_dim_ / 2, " each");
    OPENVINO_ASSERT(inputs[kTable].get_shape()[0] == qkv[0] && inputs[kSlots].get_shape() == of_tokens &&
                        inputs[kVisible].get_shape() == of_tokens && inputs[kCopied].get_shape() == ov::Shape{qkv[0]},
                    "MultiHeadAttention: table, slots, visible slots and copied rows of ", inputs[kTable].get_shape(),
                    ", ", inputs[kSlots].get_shape(), ", ", inputs[kVisible].get_shape(), " and ",
                    inputs[kCopied].get_shape(), ", wanted those of ", of_tokens, " tokens");
}

void MultiHeadAttention::run(ov::TensorVector& outputs, const ov::TensorVector& inputs, Team& team) const {
    const ov::Tensor& cache = inputs[kCache];
    // The plugin hands out the state's own buffer; the self-test at load makes sure of it.
    auto* memory = const_cast<uint8_t*>(cache.data<const uint8_t>());
    if (!in_place_) {
        memory = outputs[1].data<uint8_t>();
        std::memcpy(memory, cache.data(), cache.get_byte_size());
    }
    check_shapes(inputs);
    AttentionCall call{};
    call.layout = cache_layout(num_key_value_heads_, head_dim_, dim(cache, 3));
    call.num_attention_heads = num_attention_heads_;
    call.batch = dim(inputs[kQkv], 0);
    call.length = dim(inputs[kQkv], 1);
    call.angles = dim(inputs[kCos], 2);
    call.qkv = inputs[kQkv].data<const float>();
    call.cos = inputs[kCos].data<const float>();
    call.sin = inputs[kSin].data<const float>();
    call.table_blocks = dim(inputs[kTable], 1);
    call.table = inputs[kTable].data<const int32_t>();
    call.slots = inputs[kSlots].data<const int32_t>();
    call.visible = inputs[kVisible].data<const int32_t>();
    call.copied = inputs[kCopied].data<const int32_t>();
    call.cache_rows = dim(cache, 0);
    call.cache_blocks = dim(cache, 1);
    call.cache = memory;
    call.context = outputs[0].data<float>();
    OPENVINO_ASSERT(dim(cache, 2) == num_key_value_heads_, "MultiHeadAttention: a cache of ", dim(cache, 2),
                    " heads, wanted ", num_key_value_heads_);
    run_attention(kernels(), call, team);
}

}  // namespace chatglm
