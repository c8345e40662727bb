#include "ops/cache_view.h"

#include "kernels/memory.h"

namespace chatglm {

CacheView::CacheView(const AttentionCall& call, const int64_t* lengths)
    : kv_heads_(call.layout.kv_heads), blocks_(call.table_blocks) {
    static thread_local Scratch pointers;
    pointers_ = pointers.get<const uint8_t*>(call.batch * kv_heads_ * blocks_);
    for (int64_t row = 0; row < call.batch; ++row) {
        for (int64_t head = 0; head < kv_heads_; ++head) {
            const uint8_t** of_head = pointers_ + (row * kv_heads_ + head) * blocks_;
            for (int64_t block = 0; block < blocks_of(lengths[row]); ++block) {
                of_head[block] = call.block(call.cache_row(row, block), block, head);
            }
        }
    }
}

}  // namespace chatglm
