// Rows of a packed weight by token id: the embedding of a model whose LM head is the same weight.
#pragma once

#include "ops/operation.h"

namespace chatglm {

struct EmbeddingAttributes {
    PackedAttributes weight_;
};

// Inputs: ids int32 [B, L], weight uint8 (payload of packing.h). Output: float32 [B, L, in_features].
class Embedding : public Cloned<Embedding, EmbeddingAttributes> {
public:
    OPENVINO_OP("Embedding", "chatglm", Operation);
    using Cloned::Cloned;

    void validate_and_infer_types() override;
    bool visit_attributes(ov::AttributeVisitor& visitor) override;
    void run(ov::TensorVector& outputs, const ov::TensorVector& inputs, Team& team) const override;
};

}  // namespace chatglm
