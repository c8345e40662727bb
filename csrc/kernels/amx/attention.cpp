// Attention with tiles, for a bf16 cache: its lines are the rows of B tiles as they lie.
//
// Two blocks of 32 slots are 6 tile loads and 8 products for 32 dims of the scores, and 5 loads and 4 products for 32
// slots of 64 dims of the context. Few rows are multiplied so too: the cache is the limit there, and another kernel
// would round in another way, so that the last tokens of a row in a padded batch would not be those of the row alone.
#include "kernels/attention_bf16-inl.h"

#include "kernels/amx/tiles.h"
#include "kernels/levels.h"

namespace chatglm::CHATGLM_AMX_LEVEL {
namespace {

constexpr int64_t kTileBytes = 1024;
// Tiles of the cache are prefetched that far ahead of their use: 16 KB, more than a core reads during a miss.
constexpr int64_t kAheadTiles = 16;

// Pointers to the tiles of the cache, in the order in which a step reads them.
class ReadingOrder {
public:
    explicit ReadingOrder(const uint8_t** tiles) : tiles_(tiles) {}

    void clear() { count_ = next_ = 0; }
    void add(const void* tile) { tiles_[count_++] = static_cast<const uint8_t*>(tile); }

    const uint8_t* take() {
        const int64_t ahead = next_ + kAheadTiles;
        if (ahead < count_) {
            for (int64_t i = 0; i < kTileBytes; i += 64) _mm_prefetch(tiles_[ahead] + i, _MM_HINT_T0);
        }
        return tiles_[next_++];
    }

private:
    const uint8_t** tiles_;
    int64_t count_ = 0, next_ = 0;
};

class TiledRun : Bf16Run {
public:
    explicit TiledRun(const AttentionTile& tile)
        : Bf16Run(tile), order_(order_memory().get<const uint8_t*>(2 * kStepBlocks * dim_ / 16 + kAheadTiles)) {}

    void run() {
        const TileScope tiles(tile_.rows, 64);
        for (int64_t begin = tile_.begin; begin < end_; begin += kStepSlots) {
            const int64_t slots = std::min(kStepSlots, end_ - begin);
            plan(begin, slots);
            for (int64_t at = 0; at < slots; at += 2 * kBlockSlots) compute_scores(weight_ + at);
            for (int64_t row = 0; row < tile_.rows; ++row) update_softmax(row, begin, slots);
            accumulate_values((slots + kBlockSlots - 1) / kBlockSlots);
        }
    }

private:
    static Scratch& order_memory() {
        static thread_local Scratch memory;
        return memory;
    }

    void add_keys(int64_t first, int64_t blocks) {
        for (int64_t block = first; block < first + blocks; block += 2) {
            // A block without a partner is multiplied twice.
            const uint8_t* pair[2] = {keys(block), keys(std::min(block + 1, first + blocks - 1))};
            for (int64_t d = 0; d < dim_; d += 32) {
                for (const uint8_t* each : pair) {
                    order_.add(each + d / 32 * kTileBytes);
                    order_.add(each + (dim_ + d) / 32 * kTileBytes);
                }
            }
        }
    }

    // Keys and values of a step, and as much of the next step's keys as is prefetched in this one.
    void plan(int64_t begin, int64_t slots) {
        const int64_t first = begin / kBlockSlots, blocks = (slots + kBlockSlots - 1) / kBlockSlots;
        order_.clear();
        add_keys(first, blocks);
        for (int64_t d = 0; d < dim_; d += 64) {
            for (int64_t block = first; block < first + blocks; ++block) {
                for (int64_t group = d; group < std::min(d + 64, dim_); group += 16) {
                    order_.add(values(block) + group / 16 * kTileBytes);
                }
            }
        }
        if (begin + kStepSlots < tile_.ahead_end) {
            const uint8_t* next = keys(first + kStepBlocks);
            const int64_t tiles = std::min(kAheadTiles, dim_ / 16);
            for (int64_t tile = 0; tile < tiles; ++tile) order_.add(next + tile * kTileBytes);
        }
    }

    // Scores of 64 slots.
    void compute_scores(float* scores) {
        zero_sums();
        for (int64_t d = 0; d < dim_; d += 32) {
            const uint16_t* query = query_ + d * 2 * tile_.rows;
            load_tile<4>(query, 64);
            load_tile<5>(query + tile_.rows * 32, 64);
            load_tile<6>(order_.take(), 64);
            load_tile<7>(order_.take(), 64);
            dot_bf16<0, 4, 6>();
            dot_bf16<1, 4, 7>();
            dot_bf16<0, 5, 6>();
            dot_bf16<1, 5, 7>();
            load_tile<6>(order_.take(), 64);
            load_tile<7>(order_.take(), 64);
            dot_bf16<2, 4, 6>();
            dot_bf16<3, 4, 7>();
            dot_bf16<2, 5, 6>();
            dot_bf16<3, 5, 7>();
        }
        constexpr int64_t kStride = kStepStride * sizeof(float);
        store_tile<0>(scores, kStride);
        store_tile<1>(scores + 16, kStride);
        store_tile<2>(scores + 32, kStride);
        store_tile<3>(scores + 48, kStride);
    }

    // Adds p times values to the context, 64 dims at a time, or the last 32.
    void accumulate_values(int64_t blocks) {
        const int64_t stride = dim_ * 4;
        for (int64_t d = 0; d < dim_; d += 64) {
            float* context = tile_.context + d;
            const bool is_half = dim_ - d == 32;
            load_tile<0>(context, stride);
            load_tile<1>(context + 16, stride);
            if (!is_half) {
                load_tile<2>(context + 32, stride);
                load_tile<3>(context + 48, stride);
            }
            for (int64_t block = 0; block < blocks; ++block) {
                load_tile<4>(rounded_ + block * tile_.rows * kBlockSlots, 64);
                load_tile<6>(order_.take(), 64);
                load_tile<7>(order_.take(), 64);
                dot_bf16<0, 4, 6>();
                dot_bf16<1, 4, 7>();
                if (is_half) continue;
                load_tile<6>(order_.take(), 64);
                load_tile<7>(order_.take(), 64);
                dot_bf16<2, 4, 6>();
                dot_bf16<3, 4, 7>();
            }
            store_tile<0>(context, stride);
            store_tile<1>(context + 16, stride);
            if (!is_half) {
                store_tile<2>(context + 32, stride);
                store_tile<3>(context + 48, stride);
            }
        }
    }

    ReadingOrder order_;
};

void attend_tile(const AttentionTile& tile) {
    static const AttentionKernel below = avx512_bf16::attention();
    if (is_whole_bf16(tile.layout)) {
        TiledRun(tile).run();
    } else {
        below.attend(tile);
    }
}

}  // namespace

AttentionKernel attention() {
    const AttentionKernel below = avx512_bf16::attention();
    return {below.append, attend_tile, below.merge};
}

}  // namespace chatglm::CHATGLM_AMX_LEVEL
