// The KV cache of one layer: u8 [rows, blocks, kv_heads, block_bytes].
//
// A block holds 32 slots (tokens) of one kv head. D' is head_dim rounded up to 16; dims behind head_dim are zero.
//
//   key    [2 halves of 16 slots][D' / 2][16 slots][2 dims]    what Q K^T reads: a line is 16 slots
//   value  [D' / 16][16 pairs of slots][16 dims][2 slots]      what P V reads: a line is 16 dims
//   int8 only: key scale float32 [32], value scale float32 [32]: element = int8 * scale of its slot
//
// Elements are float32, bfloat16 or int8 in the same order. Bf16 lines are 64 bytes: the rows of AMX B tiles.
// Slots that were never written, or lie behind the end of a sequence, hold anything, NaN included.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "kernels/packing.h"

namespace chatglm {

enum class CacheType { f32, bf16, int8 };

constexpr int64_t kBlockSlots = 32;
constexpr int64_t kHalfSlots = 16;

// Blocks of so many slots.
constexpr int64_t blocks_of(int64_t slots) { return (slots + kBlockSlots - 1) / kBlockSlots; }

struct CacheLayout {
    CacheType type;
    int64_t kv_heads;
    int64_t head_dim;

    int64_t padded_dim() const { return round_up(head_dim, 16); }
    int64_t element_bytes() const { return type == CacheType::f32 ? 4 : type == CacheType::bf16 ? 2 : 1; }
    int64_t part_bytes() const { return kBlockSlots * padded_dim() * element_bytes(); }
    int64_t value_offset() const { return part_bytes(); }
    int64_t key_scale_offset() const { return 2 * part_bytes(); }
    int64_t value_scale_offset() const { return key_scale_offset() + kBlockSlots * 4; }
    int64_t block_bytes() const { return 2 * part_bytes() + (type == CacheType::int8 ? 2 * kBlockSlots * 4 : 0); }

    // Index, in elements from the start of the part, of dim d of a slot 0..31.
    int64_t key_index(int64_t slot, int64_t d) const {
        return ((slot / kHalfSlots * (padded_dim() / 2) + d / 2) * kHalfSlots + slot % kHalfSlots) * 2 + d % 2;
    }
    int64_t value_index(int64_t slot, int64_t d) const {
        return ((d / 16 * kHalfSlots + slot / 2) * 16 + d % 16) * 2 + slot % 2;
    }
};

// The layout whose blocks have this size. Throws std::invalid_argument when none has.
inline CacheLayout cache_layout(int64_t kv_heads, int64_t head_dim, int64_t block_bytes) {
    for (CacheType type : {CacheType::f32, CacheType::bf16, CacheType::int8}) {
        const CacheLayout layout{type, kv_heads, head_dim};
        if (layout.block_bytes() == block_bytes) {
            return layout;
        }
    }
    throw std::invalid_argument("cache: blocks of " + std::to_string(block_bytes) +
                                " bytes, wanted those of f32, bf16 or int8 for head_dim " + std::to_string(head_dim));
}

}  // namespace chatglm
