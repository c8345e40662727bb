// Which cache row holds each block of each sequence, and where the new columns go.
#pragma once

#include "ops/operation.h"

namespace chatglm {

struct CacheTableAttributes {
    int64_t prefix_ = 0;
};

// A slot of a sequence is the number of its real columns before it: padding takes none. A block of slots lies in one
// row of the cache, whichever: a beam that goes on from another one shares the blocks of its past. A block that several
// sequences share is written by none of them: a sequence that goes on in it takes another row for it, to which the
// slots before are copied. That is the last block of a beam at most, whatever the length.
//
// Inputs: past_table int32 [R, P] (the state), attention_mask int32 [B, T], input_ids int32 [B, L] (for L only),
// beam_idx int32 [B] (the row of past_table that each row goes on from), and if `prefix` prefix_length int32 [B],
// the leading columns that every column sees. P may be more than T - L need: the sequence then goes on from an earlier
// point.
// Outputs: table int32 [B, T / kBlockSlots, rounded up], the cache row of each block (behind the last one: 0); slots
// int32 [B, L], -1 on padding; visible int32 [B, L], the number of slots that a new column sees; copied int32 [B], the
// cache row from which the block of the first new slot is copied before anything is written, -1 where it is not.
class CacheTable : public Cloned<CacheTable, CacheTableAttributes> {
public:
    OPENVINO_OP("CacheTable", "chatglm", Operation);
    using Cloned::Cloned;

    void validate_and_infer_types() override;
    bool visit_attributes(ov::AttributeVisitor& visitor) override;
    void run(ov::TensorVector& outputs, const ov::TensorVector& inputs, Team& team) const override;
};

}  // namespace chatglm
