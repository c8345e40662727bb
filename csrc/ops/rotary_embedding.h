// Rotate-half rotary embedding of heads laid side by side.
#pragma once

#include "ops/operation.h"

namespace chatglm {

struct RotaryEmbeddingAttributes {
    int64_t head_dim_ = 0;
};

// Inputs: x float32 [B, L, heads * head_dim], cos and sin float32 [B, L, n]; the first 2 n dims of a head turn.
class RotaryEmbedding : public Cloned<RotaryEmbedding, RotaryEmbeddingAttributes> {
public:
    OPENVINO_OP("RotaryEmbedding", "chatglm", Operation);
    using Cloned::Cloned;

    void validate_and_infer_types() override;
    bool visit_attributes(ov::AttributeVisitor& visitor) override;
    void run(ov::TensorVector& outputs, const ov::TensorVector& inputs, Team& team) const override;
};

}  // namespace chatglm
