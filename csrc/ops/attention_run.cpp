#include "ops/attention_run.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/memory.h"
#include "ops/cache_view.h"

namespace chatglm {
namespace {

// Slots of a part of the cache that is one task when there are few query rows.
constexpr int64_t kPartSlots = 256;
// Up to this many tiles a kv head, the cache is cut into parts as well.
constexpr int64_t kFewTiles = 8;

std::vector<int64_t> sequence_lengths(const AttentionCall& call) {
    std::vector<int64_t> lengths(static_cast<size_t>(call.batch), 0);
    for (int64_t row = 0; row < call.batch; ++row) {
        for (int64_t i = row * call.length; i < (row + 1) * call.length; ++i) {
            const int64_t slots = int64_t{call.slots[i]} + 1;
            lengths[static_cast<size_t>(row)] = std::max(lengths[static_cast<size_t>(row)], slots);
        }
    }
    return lengths;
}

void check(const AttentionCall& call, const std::vector<int64_t>& lengths) {
    const int64_t capacity = std::min(call.cache_blocks * kBlockSlots, call.table_slots);
    for (int64_t row = 0; row < call.batch; ++row) {
        const int64_t length = lengths[static_cast<size_t>(row)];
        if (length > capacity) {
            throw std::runtime_error("KV cache: " + std::to_string(length) + " slots in row " + std::to_string(row) +
                                     ", wanted at most " + std::to_string(capacity));
        }
        for (int64_t i = row * call.length; i < (row + 1) * call.length; ++i) {
            if (call.visible[i] > length) {
                throw std::runtime_error("KV cache: " + std::to_string(call.visible[i]) + " visible slots in row " +
                                         std::to_string(row) + ", wanted at most " + std::to_string(length));
            }
        }
        for (int64_t slot = 0; slot < length; ++slot) {
            const int32_t seen = call.table[row * call.table_slots + slot];
            if (seen < 0 || seen >= call.cache_rows) {
                throw std::runtime_error("KV cache: row " + std::to_string(seen) + ", wanted less than " +
                                         std::to_string(call.cache_rows));
            }
        }
    }
}

void append_token(const KernelTable& kernels, const AttentionCall& call, int64_t row, int64_t i) {
    const int64_t at = row * call.length + i, slot = call.slots[at], dim = call.layout.head_dim;
    if (slot < 0) return;
    static thread_local Scratch scratch;
    float* rotated = scratch.get<float>(dim);
    const float* key = call.qkv + at * call.width() + call.num_attention_heads * dim;
    const float* value = key + call.layout.kv_heads * dim;
    const int32_t cache_row = call.table[row * call.table_slots + slot];
    for (int64_t head = 0; head < call.layout.kv_heads; ++head, key += dim, value += dim) {
        kernels.elementwise.rotate(key, call.cos + at * call.angles, call.sin + at * call.angles, call.angles, dim,
                                   1.0f, rotated);
        kernels.attention.append(call.layout, call.block(cache_row, slot / kBlockSlots, head), slot % kBlockSlots,
                                 rotated, value);
    }
}

void append(const KernelTable& kernels, const AttentionCall& call, Team& team) {
    team.pieces(call.batch * call.length, 1, 4, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) append_token(kernels, call, i / call.length, i % call.length);
    });
}

// Query rows (column, head) that share a kv head lie in the order column * group + head: a tile is 16 of them, so
// that one-token calls of grouped heads and long prompts fill tiles alike.
struct Tiles {
    const KernelTable& kernels;
    const AttentionCall& call;
    const CacheView& view;
    int64_t group = call.num_attention_heads / call.layout.kv_heads;
    int64_t rows = call.length * group;
    int64_t count = (rows + kTileRows - 1) / kTileRows;

    // Position in [B, L] and head of query row r of a sequence.
    int64_t token(int64_t row, int64_t r) const { return row * call.length + r / group; }
    int64_t head(int64_t kv_head, int64_t r) const { return kv_head * group + r % group; }

    // The slots that any row of the tile sees.
    int64_t end(int64_t row, int64_t tile) const {
        int64_t most = 0;
        for (int64_t r = tile * kTileRows; r < std::min(rows, (tile + 1) * kTileRows); ++r) {
            most = std::max<int64_t>(most, call.visible[token(row, r)]);
        }
        return most;
    }

    void attend(int64_t row, int64_t kv_head, int64_t tile, int64_t begin, int64_t end, float* context, float* max,
                float* sum) const {
        static thread_local Scratch scratch;
        const int64_t first = tile * kTileRows, used = std::min(kTileRows, rows - first);
        const int64_t dim = call.layout.head_dim, padded = call.layout.padded_dim();
        const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
        float* query = scratch.get<float>(kTileRows * padded);
        int64_t visible[kTileRows];
        for (int64_t r = 0; r < used; ++r) {
            const int64_t at = token(row, first + r);
            const float* q = call.qkv + at * call.width() + head(kv_head, first + r) * dim;
            kernels.elementwise.rotate(q, call.cos + at * call.angles, call.sin + at * call.angles, call.angles, dim,
                                       scale, query + r * padded);
            std::fill(query + r * padded + dim, query + (r + 1) * padded, 0.0f);
            visible[r] = call.visible[at];
        }
        kernels.attention.attend({call.layout, used, query, visible, view.blocks(row, kv_head), begin, end,
                                  this->end(row, tile), context, max, sum});
    }

    void write(int64_t row, int64_t kv_head, int64_t tile, const float* context, const float* sum) const {
        const int64_t first = tile * kTileRows, used = std::min(kTileRows, rows - first);
        const int64_t dim = call.layout.head_dim;
        for (int64_t r = 0; r < used; ++r) {
            const int64_t place = token(row, first + r) * call.num_attention_heads + head(kv_head, first + r);
            float* out = call.context + place * dim;
            // A column of padding sees nothing; its context is 0.
            const float inverse = sum[r] == 0.0f ? 0.0f : 1.0f / sum[r];
            for (int64_t d = 0; d < dim; ++d) out[d] = context[r * call.layout.padded_dim() + d] * inverse;
        }
    }
};

// Partial result of a tile over one part of the cache: context, max and sum in one piece of memory.
struct Partial {
    float *context, *max, *sum;
    static int64_t floats(int64_t padded_dim) { return kTileRows * (padded_dim + 2); }
    Partial(float* memory, int64_t padded_dim)
        : context(memory), max(memory + kTileRows * padded_dim), sum(max + kTileRows) {}
};

// Many tiles: each is one task over all of its slots.
void run_tiles(const Tiles& tiles, Team& team) {
    const int64_t heads = tiles.call.layout.kv_heads, padded = tiles.call.layout.padded_dim();
    const int64_t tasks = tiles.call.batch * heads * tiles.count;
    team.pieces(tasks, 1, tasks, [&](int64_t begin, int64_t end) {
        static thread_local Scratch scratch;
        const Partial result(scratch.get<float>(Partial::floats(padded)), padded);
        for (int64_t task = begin; task < end; ++task) {
            const int64_t tile = task % tiles.count, kv_head = task / tiles.count % heads;
            const int64_t row = task / tiles.count / heads;
            tiles.attend(row, kv_head, tile, 0, tiles.end(row, tile), result.context, result.max, result.sum);
            tiles.write(row, kv_head, tile, result.context, result.sum);
        }
    });
}

void merge_parts(const Tiles& tiles, int64_t row, int64_t kv_head, int64_t tile, int64_t parts, float* memory) {
    const int64_t padded = tiles.call.layout.padded_dim();
    const Partial total(memory, padded);
    const int64_t used = std::min(kTileRows, tiles.rows - tile * kTileRows);
    const int64_t seen = std::max<int64_t>(1, (tiles.end(row, tile) + kPartSlots - 1) / kPartSlots);
    for (int64_t part = 1; part < std::min(parts, seen); ++part) {
        const Partial next(memory + part * Partial::floats(padded), padded);
        for (int64_t r = 0; r < used; ++r) {
            tiles.kernels.attention.merge(padded, next.context + r * padded, next.max[r], next.sum[r],
                                          total.context + r * padded, total.max + r, total.sum + r);
        }
    }
    tiles.write(row, kv_head, tile, total.context, total.sum);
}

// Few tiles, as in decoding: each is cut into parts of the cache of a fixed size, merged in order, so that a result
// depends neither on the number of threads nor on other rows.
void run_parts(const Tiles& tiles, int64_t longest, Team& team) {
    static thread_local Scratch scratch;
    const int64_t heads = tiles.call.layout.kv_heads, padded = tiles.call.layout.padded_dim();
    const int64_t parts = std::max<int64_t>(1, (longest + kPartSlots - 1) / kPartSlots);
    const int64_t groups = tiles.call.batch * heads * tiles.count;
    float* memory = scratch.get<float>(groups * parts * Partial::floats(padded));
    const auto place = [&](int64_t group, int64_t part) {
        return memory + (group * parts + part) * Partial::floats(padded);
    };
    const auto row_of = [&](int64_t group) { return group / tiles.count / heads; };
    const auto head_of = [&](int64_t group) { return group / tiles.count % heads; };
    team.pieces(groups * parts, 1, groups * parts, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            const int64_t group = task / parts, part = task % parts, tile = group % tiles.count;
            const int64_t from = part * kPartSlots;
            const int64_t to = std::min(tiles.end(row_of(group), tile), from + kPartSlots);
            if (part > 0 && from >= to) continue;
            const Partial result(place(group, part), padded);
            tiles.attend(row_of(group), head_of(group), tile, from, to, result.context, result.max, result.sum);
        }
    });
    // A merge is short: the start of a task is worth it for several only.
    team.pieces(groups, 8, 1, [&](int64_t begin, int64_t end) {
        for (int64_t group = begin; group < end; ++group) {
            merge_parts(tiles, row_of(group), head_of(group), group % tiles.count, parts, place(group, 0));
        }
    });
}

}  // namespace

void run_attention(const KernelTable& kernels, const AttentionCall& call, Team& team) {
    if (call.batch == 0) return;
    const std::vector<int64_t> lengths = sequence_lengths(call);
    check(call, lengths);
    append(kernels, call, team);
    const CacheView view(call, lengths.data(), team);
    const Tiles tiles{kernels, call, view};
    if (tiles.count > kFewTiles) {
        run_tiles(tiles, team);
    } else {
        run_parts(tiles, *std::max_element(lengths.begin(), lengths.end()), team);
    }
}

}  // namespace chatglm
