#include "ops/attention_run.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/memory.h"
#include "ops/cache_view.h"

namespace chatglm {
namespace {

// Slots of a part of the cache that is one task when there are few query rows.
constexpr int64_t kPartSlots = 256;
// Up to so many tiles of tokens a kv head, the cache is cut into parts as well.
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

void check_row(const AttentionCall& call, int32_t row) {
    if (row >= 0 && row < call.cache_rows) return;
    throw std::runtime_error("KV cache: row " + std::to_string(row) + ", wanted less than " +
                             std::to_string(call.cache_rows));
}

void check(const AttentionCall& call, const std::vector<int64_t>& lengths) {
    const int64_t capacity = std::min(call.cache_blocks * kBlockSlots, call.table_blocks * kBlockSlots);
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
        for (int64_t block = 0; block < blocks_of(length); ++block) check_row(call, call.cache_row(row, block));
        if (call.copied[row] != -1) check_row(call, call.copied[row]);
    }
}

// Shared blocks that are about to be written, to the rows that their sequences have for them now.
void copy_blocks(const AttentionCall& call, Team& team) {
    if (std::all_of(call.copied, call.copied + call.batch, [](int32_t row) { return row == -1; })) return;
    team.pieces(call.batch * call.layout.kv_heads, 1, 4, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t row = i / call.layout.kv_heads, head = i % call.layout.kv_heads;
            const int32_t* slots = call.slots + row * call.length;
            const int32_t* first = std::find_if(slots, slots + call.length, [](int32_t slot) { return slot >= 0; });
            if (call.copied[row] == -1 || first == slots + call.length) continue;
            const int64_t block = *first / kBlockSlots;
            std::memcpy(call.block(call.cache_row(row, block), block, head), call.block(call.copied[row], block, head),
                        static_cast<size_t>(call.layout.block_bytes()));
        }
    });
}

void append_token(const KernelTable& kernels, const AttentionCall& call, int64_t row, int64_t i) {
    const int64_t at = row * call.length + i, slot = call.slots[at], dim = call.layout.head_dim;
    if (slot < 0) return;
    static thread_local Scratch scratch;
    float* rotated = scratch.get<float>(dim);
    const float* key = call.qkv + at * call.width() + call.num_attention_heads * dim;
    const float* value = key + call.layout.kv_heads * dim;
    const int32_t cache_row = call.cache_row(row, slot / kBlockSlots);
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

bool are_finite(const float* x, int64_t count) {
    float nothing = 0.0f;
    for (int64_t i = 0; i < count; ++i) nothing += x[i] * 0.0f;
    return nothing == 0.0f;
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
        AttentionTile task{call.layout, used, query, visible, view.blocks(row, kv_head), begin, end,
                           this->end(row, tile), context, max, sum};
        kernels.attention.attend(task);
        // A value that is not finite makes NaN of a weight of 0 too: rows that do not see it go by themselves then.
        for (int64_t r = 0; r < used; ++r) {
            const int64_t seen = visible[r];
            if (seen >= end || are_finite(context + r * padded, dim)) continue;
            std::fill_n(context + r * padded, padded, 0.0f);
            max[r] = -std::numeric_limits<float>::infinity();
            sum[r] = 0.0f;
            if (seen <= begin) continue;
            kernels.attention.attend({call.layout, 1, query + r * padded, visible + r, task.blocks, begin,
                                      std::min(end, seen), seen, context + r * padded, max + r, sum + r});
        }
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

// A tile of a sequence and kv head.
struct TileTask {
    int64_t row, kv_head, tile;
};

// Many tiles: each is one task over all of its slots.
void run_tiles(const Tiles& tiles, const std::vector<TileTask>& tasks, Team& team) {
    const int64_t padded = tiles.call.layout.padded_dim(), count = static_cast<int64_t>(tasks.size());
    team.pieces(count, 1, count, [&](int64_t begin, int64_t end) {
        static thread_local Scratch scratch;
        const Partial result(scratch.get<float>(Partial::floats(padded)), padded);
        for (int64_t i = begin; i < end; ++i) {
            const auto [row, kv_head, tile] = tasks[static_cast<size_t>(i)];
            tiles.attend(row, kv_head, tile, 0, tiles.end(row, tile), result.context, result.max, result.sum);
            tiles.write(row, kv_head, tile, result.context, result.sum);
        }
    });
}

void merge_parts(const Tiles& tiles, const TileTask& task, int64_t parts, float* memory) {
    const int64_t padded = tiles.call.layout.padded_dim();
    const Partial total(memory, padded);
    const int64_t used = std::min(kTileRows, tiles.rows - task.tile * kTileRows);
    const int64_t seen = std::max<int64_t>(1, (tiles.end(task.row, task.tile) + kPartSlots - 1) / kPartSlots);
    for (int64_t part = 1; part < std::min(parts, seen); ++part) {
        const Partial next(memory + part * Partial::floats(padded), padded);
        for (int64_t r = 0; r < used; ++r) {
            tiles.kernels.attention.merge(padded, next.context + r * padded, next.max[r], next.sum[r],
                                          total.context + r * padded, total.max + r, total.sum + r);
        }
    }
    tiles.write(task.row, task.kv_head, task.tile, total.context, total.sum);
}

// Few tiles, as in decoding: each is cut into parts of the cache of a fixed size, merged in order, so that a result
// depends neither on the number of threads nor on other rows.
void run_parts(const Tiles& tiles, const std::vector<TileTask>& tasks, int64_t longest, Team& team) {
    static thread_local Scratch scratch;
    const int64_t padded = tiles.call.layout.padded_dim(), count = static_cast<int64_t>(tasks.size());
    const int64_t parts = std::max<int64_t>(1, (longest + kPartSlots - 1) / kPartSlots);
    float* memory = scratch.get<float>(count * parts * Partial::floats(padded));
    const auto place = [&](int64_t index) { return memory + index * Partial::floats(padded); };
    team.pieces(count * parts, 1, count * parts, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const auto [row, kv_head, tile] = tasks[static_cast<size_t>(i / parts)];
            const int64_t from = i % parts * kPartSlots, to = std::min(tiles.end(row, tile), from + kPartSlots);
            if (from > 0 && from >= to) continue;
            const Partial result(place(i), padded);
            tiles.attend(row, kv_head, tile, from, to, result.context, result.max, result.sum);
        }
    });
    // A merge is short: the start of a task is worth it for several only.
    team.pieces(count, 8, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            merge_parts(tiles, tasks[static_cast<size_t>(i)], parts, place(i * parts));
        }
    });
}

// Rows with few tokens and rows with many are done in two ways, which round differently. Padding does not count: a row
// is done as it would be alone.
struct Tasks {
    std::vector<TileTask> few, many;
    int64_t longest_of_few = 0;

    Tasks(const Tiles& tiles, const std::vector<int64_t>& lengths) {
        for (int64_t row = 0; row < tiles.call.batch; ++row) add(tiles, row, lengths[static_cast<size_t>(row)]);
    }

private:
    void add(const Tiles& tiles, int64_t row, int64_t length) {
        const int32_t* slots = tiles.call.slots + row * tiles.call.length;
        const auto is_real = [](int32_t slot) { return slot >= 0; };
        const int64_t real = std::count_if(slots, slots + tiles.call.length, is_real);
        const bool is_few = real * tiles.group <= kFewTiles * kTileRows;
        // Of the padding before the tokens nothing is computed.
        const int64_t padding = std::find_if(slots, slots + tiles.call.length, is_real) - slots;
        const int64_t first = padding * tiles.group / kTileRows;
        const int64_t width = tiles.call.num_attention_heads * tiles.call.layout.head_dim;
        std::fill_n(tiles.call.context + row * tiles.call.length * width, padding * width, 0.0f);
        if (is_few) longest_of_few = std::max(longest_of_few, length);
        std::vector<TileTask>& tasks = is_few ? few : many;
        for (int64_t kv_head = 0; kv_head < tiles.call.layout.kv_heads; ++kv_head) {
            for (int64_t tile = first; tile < tiles.count; ++tile) tasks.push_back({row, kv_head, tile});
        }
    }
};

}  // namespace

void run_attention(const KernelTable& kernels, const AttentionCall& call, Team& team) {
    if (call.batch == 0) return;
    const std::vector<int64_t> lengths = sequence_lengths(call);
    check(call, lengths);
    copy_blocks(call, team);
    append(kernels, call, team);
    const CacheView view(call, lengths.data());
    const Tiles tiles{kernels, call, view};
    const Tasks tasks(tiles, lengths);
    run_tiles(tiles, tasks.many, team);
    run_parts(tiles, tasks.few, tasks.longest_of_few, team);
}

}  // namespace chatglm
