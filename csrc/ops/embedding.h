// Rows of a weight by token id.
#pragma once

#include "ops/operation.h"

namespace chatglm {

struct EmbeddingAttributes {
    PackedAttributes weight_;
};

// Of a packed weight: the embedding of a model whose LM head is the same weight.
// Inputs: ids int32 [B, L], weight uint8 (payload of packing.h). Output: float32 [B, L, in_features].
class Embedding : public Cloned<Embedding, EmbeddingAttributes> {
public:
    OPENVINO_OP("Embedding", "chatglm", Operation);
    using Cloned::Cloned;

    void validate_and_infer_types() override;
    bool visit_attributes(ov::AttributeVisitor& visitor) override;
    ov::element::Type source_type() const override { return ov::element::i32; }
    ov::PartialShape output_shape(ov::PartialShape ids, const KnownNumber&) const override;
    void run(ov::TensorVector& outputs, const ov::TensorVector& inputs, Team& team) const override;
};

struct EmbeddingRowsAttributes {
    int64_t hidden_size_ = 0;
};

// Of a weight that lies row by row.
// Inputs: ids int32 [B, L], weight float32, bfloat16 or int8 [V, hidden_size], and of int8 the scales float32 [V, 1].
// Output: float32 [B, L, hidden_size].
class EmbeddingRows : public Cloned<EmbeddingRows, EmbeddingRowsAttributes> {
public:
    OPENVINO_OP("EmbeddingRows", "chatglm", Operation);
    using Cloned::Cloned;

    void validate_and_infer_types() override;
    bool visit_attributes(ov::AttributeVisitor& visitor) override;
    ov::element::Type source_type() const override { return ov::element::i32; }
    ov::PartialShape output_shape(ov::PartialShape ids, const KnownNumber&) const override;
    void run(ov::TensorVector& outputs, const ov::TensorVector& inputs, Team& team) const override;
};

}  // namespace chatglm
