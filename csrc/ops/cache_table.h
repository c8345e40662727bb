// Which cache row holds each slot of each sequence, and where the new columns go.
#pragma once

#include "ops/operation.h"

namespace chatglm {

struct CacheTableAttributes {
    int64_t prefix_ = 0;
};

// A slot of a sequence is the number of its real columns before it: padding takes none. A slot may lie in any row
// of the cache, so that a beam that goes on from another one shares its past and nothing is moved.
//
// Inputs: past_table int32 [R, P] (the state), attention_mask int32 [B, T], input_ids int32 [B, L] (for L only),
// beam_idx int32 [B] (the row of past_table that each row goes on from), and if `prefix` prefix_length int32 [B],
// the leading columns that every column sees. P may exceed T - L: the sequence then goes on from an earlier point.
// Outputs: table int32 [B, T], the cache row of each slot (behind the last slot: 0); slots int32 [B, L], -1 on
// padding; visible int32 [B, L], the number of slots that a new column sees.
class CacheTable : public Cloned<CacheTable, CacheTableAttributes> {
public:
    OPENVINO_OP("CacheTable", "chatglm", Operation);
    using Cloned::Cloned;

    void validate_and_infer_types() override;
    bool visit_attributes(ov::AttributeVisitor& visitor) override;
    void run(ov::TensorVector& outputs, const ov::TensorVector& inputs, Team& team) const override;
};

}  // namespace chatglm
