// The blocks of every sequence and kv head as the attention kernels take them.
#pragma once

#include "ops/attention_run.h"

namespace chatglm {

// Pointers [B, kv_heads, blocks], valid until the next call on the same thread.
class CacheView {
public:
    // lengths [B]: slots that each sequence has.
    CacheView(const AttentionCall& call, const int64_t* lengths);

    const uint8_t* const* blocks(int64_t row, int64_t kv_head) const {
        return pointers_ + (row * kv_heads_ + kv_head) * blocks_;
    }

private:
    int64_t kv_heads_, blocks_;
    const uint8_t** pointers_;
};

}  // namespace chatglm
