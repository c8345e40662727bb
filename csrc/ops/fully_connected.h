// y = activation(norm(x) W^T + bias) + residual_scale * residual over a packed weight.
#pragma once

#include "kernels/table.h"
#include "ops/operation.h"

namespace chatglm {

struct FullyConnectedAttributes {
    PackedAttributes weight_;
    std::string activation_ = "none";
    int64_t y_features_ = 0;
    int64_t bias_ = 0, residual_ = 0;
    int64_t activation_bits_ = 16;
    float residual_scale_ = 1.0f;
    std::string norm_ = "none";  // or "rms", "layer"
    float norm_eps_ = 0.0f;
};

// Inputs: x float32 [..., in_features], weight uint8 (payload of packing.h), bias float32 [16 panels] if `bias`,
// residual float32 [..., y_features] if `residual`, weight of the norm float32 [in_features] if there is one, its bias
// likewise if `norm` is "layer". Output: float32 [..., y_features].
class FullyConnected : public Cloned<FullyConnected, FullyConnectedAttributes> {
public:
    OPENVINO_OP("FullyConnected", "chatglm", Operation);
    using Cloned::Cloned;

    void validate_and_infer_types() override;
    bool visit_attributes(ov::AttributeVisitor& visitor) override;
    ov::PartialShape output_shape(ov::PartialShape x, const KnownNumber&) const override;
    void run(ov::TensorVector& outputs, const ov::TensorVector& inputs, Team& team) const override;
};

}  // namespace chatglm
