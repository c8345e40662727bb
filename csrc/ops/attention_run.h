// Rotary, append to the cache and attention of one layer, over the threads of a team.
#pragma once

#include "kernels/table.h"
#include "ops/team.h"

namespace chatglm {

struct AttentionCall {
    CacheLayout layout;
    int64_t num_attention_heads;
    int64_t batch, length;            // B, L
    int64_t angles;                   // n: the first 2 n dims of a head turn
    const float* qkv;                 // [B, L, (heads + 2 kv_heads) head_dim], planes q, k, v
    const float *cos, *sin;           // [B, L, n]
    // CacheTable:
    int64_t table_blocks;
    const int32_t* table;             // [B, table_blocks]: cache row of each block
    const int32_t *slots, *visible;   // [B, L]
    const int32_t* copied;            // [B]
    int64_t cache_rows, cache_blocks;
    uint8_t* cache;                   // [cache_rows, cache_blocks, kv_heads, block_bytes]
    float* context;                   // [B, L, heads head_dim]

    int64_t width() const { return (num_attention_heads + 2 * layout.kv_heads) * layout.head_dim; }
    int32_t cache_row(int64_t row, int64_t block) const { return table[row * table_blocks + block]; }
    uint8_t* block(int64_t row, int64_t block, int64_t kv_head) const {
        return cache + ((row * cache_blocks + block) * layout.kv_heads + kv_head) * layout.block_bytes();
    }
};

// Throws std::runtime_error when a slot or a row lies outside of the cache.
void run_attention(const KernelTable& table, const AttentionCall& call, Team& team);

}  // namespace chatglm
