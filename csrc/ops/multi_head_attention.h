// Rotary, append to the KV cache inside the model, attention.
#pragma once

#include "kernels/cache_layout.h"
#include "ops/operation.h"

namespace chatglm {

struct MultiHeadAttentionAttributes {
    int64_t num_attention_heads_ = 0, num_key_value_heads_ = 0, head_dim_ = 0;
    int64_t in_place_ = 1;
};

// Letters: H = num_attention_heads, G = num_key_value_heads, D = head_dim, n angles.
// Inputs: qkv float32 [B, L, (H + 2 G) D] in planes q, k, v; cos and sin float32 [B, L, n]; table int32 [B, blocks],
// slots and visible int32 [B, L], copied int32 [B] (CacheTable); cache uint8 [R, blocks, G, block_bytes]
// (cache_layout.h; the size of a block tells the type of its elements).
// Outputs: context float32 [B, L, H D]. With in_place the cache is written where it lies: it must be the value of a
// state that the plugin keeps in one buffer. Without, a second output is the new cache.
class MultiHeadAttention : public Cloned<MultiHeadAttention, MultiHeadAttentionAttributes> {
public:
    OPENVINO_OP("MultiHeadAttention", "chatglm", Operation);
    using Cloned::Cloned;

    void validate_and_infer_types() override;
    bool visit_attributes(ov::AttributeVisitor& visitor) override;
    ov::PartialShape output_shape(ov::PartialShape qkv, const KnownNumber&) const override;
    void run(ov::TensorVector& outputs, const ov::TensorVector& inputs, Team& team) const override;

private:
    void check_shapes(const ov::TensorVector& inputs) const;
};

}  // namespace chatglm
