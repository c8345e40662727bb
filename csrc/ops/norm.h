// RMSNorm and LayerNorm over the last dimension.
#pragma once

#include "ops/operation.h"

namespace chatglm {

struct NormAttributes {
    std::string kind_ = "rms";
    float eps_ = 1e-5f;
    int64_t residual_ = 0;
};

// Inputs: x float32 [..., C], weight float32 [C], bias float32 [C] with kind "layer", and if `residual` what is added
// to the norm, float32 [..., C]. Output: float32 [..., C].
class Norm : public Cloned<Norm, NormAttributes> {
public:
    OPENVINO_OP("Norm", "chatglm", Operation);
    using Cloned::Cloned;

    void validate_and_infer_types() override;
    bool visit_attributes(ov::AttributeVisitor& visitor) override;
    void run(ov::TensorVector& outputs, const ov::TensorVector& inputs, Team& team) const override;
};

}  // namespace chatglm
