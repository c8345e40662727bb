// The rows whose logits somebody wants.
#pragma once

#include "ops/operation.h"

namespace chatglm {

// Inputs: x float32 [B, L, C], count int32 [1]. Output: float32 [B, n, C], the last n of the L rows: n is count, but L
// where count is 0 or more than that.
class LastRows : public Cloned<LastRows, NoAttributes> {
public:
    OPENVINO_OP("LastRows", "chatglm", Operation);
    using Cloned::Cloned;

    void validate_and_infer_types() override;
    ov::PartialShape output_shape(ov::PartialShape x, const KnownNumber& number) const override;
    void run(ov::TensorVector& outputs, const ov::TensorVector& inputs, Team& team) const override;
};

}  // namespace chatglm
