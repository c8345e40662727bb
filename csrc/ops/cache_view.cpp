#include "ops/cache_view.h"

#include <algorithm>
#include <cstring>

#include "kernels/memory.h"

namespace chatglm {
namespace {

// Copies one slot of a block into the same slot of another.
void copy_slot(const CacheLayout& layout, const uint8_t* from, uint8_t* to, int64_t slot) {
    const int64_t size = layout.element_bytes();
    for (int64_t d = 0; d < layout.padded_dim(); d += 2) {
        const int64_t at = layout.key_index(slot, d) * size;
        std::memcpy(to + at, from + at, static_cast<size_t>(2 * size));
    }
    for (int64_t d = 0; d < layout.padded_dim(); ++d) {
        const int64_t at = layout.value_offset() + layout.value_index(slot, d) * size;
        std::memcpy(to + at, from + at, static_cast<size_t>(size));
    }
    if (layout.type == CacheType::int8) {
        for (int64_t scales : {layout.key_scale_offset(), layout.value_scale_offset()}) {
            std::memcpy(to + scales + slot * 4, from + scales + slot * 4, 4);
        }
    }
}

// The slots of one block of one sequence: the cache row of each.
struct BlockRows {
    const int32_t* rows;
    int64_t used;

    bool in_one_row() const {
        return std::all_of(rows, rows + used, [this](int32_t row) { return row == rows[0]; });
    }

    void assemble(const AttentionCall& call, int64_t block, int64_t kv_head, uint8_t* to) const {
        std::memcpy(to, call.block(rows[0], block, kv_head), static_cast<size_t>(call.layout.block_bytes()));
        for (int64_t slot = 1; slot < used; ++slot) {
            if (rows[slot] != rows[0]) copy_slot(call.layout, call.block(rows[slot], block, kv_head), to, slot);
        }
    }
};

BlockRows block_rows(const AttentionCall& call, const int64_t* lengths, int64_t row, int64_t block) {
    const int64_t used = std::clamp<int64_t>(lengths[row] - block * kBlockSlots, 0, kBlockSlots);
    return {call.table + row * call.table_slots + block * kBlockSlots, used};
}

}  // namespace

CacheView::CacheView(const AttentionCall& call, const int64_t* lengths, Team& team)
    : kv_heads_(call.layout.kv_heads), blocks_((call.table_slots + kBlockSlots - 1) / kBlockSlots) {
    static thread_local Scratch pointers, assembled;
    const int64_t block_bytes = call.layout.block_bytes();
    int64_t mixed = 0;
    pointers_ = pointers.get<const uint8_t*>(call.batch * kv_heads_ * blocks_);
    for (int64_t row = 0; row < call.batch; ++row) {
        for (int64_t block = 0; block < blocks_; ++block) {
            mixed += block_rows(call, lengths, row, block).in_one_row() ? 0 : 1;
        }
    }
    uint8_t* room = assembled.get<uint8_t>(mixed * kv_heads_ * block_bytes);
    for (int64_t row = 0; row < call.batch; ++row) {
        for (int64_t block = 0; block < blocks_; ++block) {
            const BlockRows slots = block_rows(call, lengths, row, block);
            if (slots.used == 0) break;
            const bool direct = slots.in_one_row();
            for (int64_t head = 0; head < kv_heads_; ++head) {
                pointers_[(row * kv_heads_ + head) * blocks_ + block] =
                    direct ? call.block(slots.rows[0], block, head) : room + head * block_bytes;
            }
            if (direct) continue;
            team.pieces(kv_heads_, 1, 4, [&](int64_t begin, int64_t end) {
                for (int64_t head = begin; head < end; ++head) {
                    slots.assemble(call, block, head, room + head * block_bytes);
                }
            });
            room += kv_heads_ * block_bytes;
        }
    }
}

}  // namespace chatglm
