// Attention with tiles, for a bf16 cache: its lines are the rows of B tiles as they lie.
//
// Slots are taken in steps of 256: scores, online softmax in float32, then P V. Queries go in as the sum of two bf16
// numbers (16 bits); p is rounded to bf16, and the sum of p is that of the rounded ones. Two blocks of 32 slots are 6
// tile loads and 8 products for 32 dims of the scores, and 5 loads and 4 products for 32 slots of 64 dims of the
// context.
#include "kernels/attention-inl.h"

#include "kernels/amx/tiles.h"
#include "kernels/levels.h"

namespace chatglm::CHATGLM_AMX_LEVEL {
namespace {

// Fewer rows go to the kernel of AVX-512, as a tile product costs the more for each row the fewer there are. To be
// measured on a machine with AMX.
constexpr int64_t kLeastRows = 8;

constexpr int64_t kTileBytes = 1024;
constexpr int64_t kStepBlocks = kStepSlots / kBlockSlots;
// Tiles of the cache are prefetched that far ahead of their use: 16 KB, more than a core reads during a miss.
constexpr int64_t kAheadTiles = 16;

typedef uint16_t HalfLine __attribute__((vector_size(32)));

inline HalfLine to_bf16(Floats v) {
    const __m256bh rounded = _mm512_cvtneps_pbh(__m512(v));
    HalfLine bits;
    std::memcpy(&bits, &rounded, sizeof bits);
    return bits;
}

inline Floats from_bf16(HalfLine v) {
    return floats_of_bits(__builtin_convertvector(v, Ints) << 16);
}

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

class Bf16TileRun {
public:
    explicit Bf16TileRun(const AttentionTile& tile)
        : tile_(tile),
          dim_(tile.layout.padded_dim()),
          end_(std::min(tile.end, *std::max_element(tile.visible, tile.visible + tile.rows))),
          order_(order_memory().get<const uint8_t*>(2 * kStepBlocks * dim_ / 16 + kAheadTiles)),
          query_(query_memory().get<uint16_t>(2 * tile.rows * dim_)),
          last_values_(values_memory().get<uint16_t>(kBlockSlots * dim_)) {
        std::fill(tile.context, tile.context + tile.rows * dim_, 0.0f);
        std::fill(tile.max, tile.max + tile.rows, -kInfinity);
        std::fill(tile.sum, tile.sum + tile.rows, 0.0f);
        split_query();
        if (end_ % kBlockSlots != 0 && end_ > tile.begin) copy_last_values();
    }

    void run() {
        const TileScope tiles(tile_.rows, 64);
        for (int64_t begin = tile_.begin; begin < end_; begin += kStepSlots) {
            const int64_t slots = std::min(kStepSlots, end_ - begin);
            plan(begin, slots);
            for (int64_t at = 0; at < slots; at += 2 * kBlockSlots) score(weight_ + at);
            for (int64_t row = 0; row < tile_.rows; ++row) soften(row, begin, slots);
            weigh((slots + kBlockSlots - 1) / kBlockSlots);
        }
    }

private:
    static Scratch& order_memory() {
        static thread_local Scratch memory;
        return memory;
    }
    static Scratch& query_memory() {
        static thread_local Scratch memory;
        return memory;
    }
    static Scratch& values_memory() {
        static thread_local Scratch memory;
        return memory;
    }

    // [dim / 32][high, low][row][32 dims]
    void split_query() {
        for (int64_t row = 0; row < tile_.rows; ++row) {
            for (int64_t d = 0; d < dim_; d += kLanes) {
                const Floats q = load(tile_.query + row * dim_ + d);
                const HalfLine high = to_bf16(q), low = to_bf16(q - from_bf16(high));
                uint16_t* to = query_ + (d / 32 * 2 * tile_.rows + row) * 32 + d % 32;
                std::memcpy(to, &high, sizeof high);
                std::memcpy(to + tile_.rows * 32, &low, sizeof low);
            }
        }
    }

    // Values of the last block with zeros from `end_` on: p = 0 there, but 0 times NaN is NaN.
    void copy_last_values() {
        const int64_t valid = end_ % kBlockSlots;
        const uint8_t* block = tile_.blocks[end_ / kBlockSlots] + tile_.layout.value_offset();
        std::memcpy(last_values_, block, static_cast<size_t>(tile_.layout.part_bytes()));
        for (int64_t slot = valid; slot < kBlockSlots; ++slot) {
            for (int64_t d = 0; d < dim_; ++d) last_values_[tile_.layout.value_index(slot, d)] = 0;
        }
    }

    const uint8_t* values(int64_t block) const {
        const bool is_copied = block == end_ / kBlockSlots;
        return is_copied ? reinterpret_cast<const uint8_t*>(last_values_)
                         : tile_.blocks[block] + tile_.layout.value_offset();
    }

    void add_keys(int64_t first, int64_t blocks) {
        for (int64_t block = first; block < first + blocks; block += 2) {
            // A block without a partner is multiplied twice.
            const uint8_t* pair[2] = {tile_.blocks[block], tile_.blocks[std::min(block + 1, first + blocks - 1)]};
            for (int64_t d = 0; d < dim_; d += 32) {
                for (const uint8_t* keys : pair) {
                    order_.add(keys + d / 32 * kTileBytes);
                    order_.add(keys + (dim_ + d) / 32 * kTileBytes);
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
        if (begin + kStepSlots < end_) {
            const uint8_t* next = tile_.blocks[first + kStepBlocks];
            const int64_t tiles = std::min(kAheadTiles, dim_ / 16);
            for (int64_t tile = 0; tile < tiles; ++tile) order_.add(next + tile * kTileBytes);
        }
    }

    // Scores of 64 slots.
    void score(float* scores) {
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

    // p of 16 slots of a row, of which `count` are seen, to [block][row][32 slots]; returns them as rounded.
    Floats store_weights(int64_t row, int64_t at, int64_t count, Floats p) {
        const HalfLine rounded = to_bf16(first_lanes(count) ? p : Floats{});
        std::memcpy(rounded_ + (at / kBlockSlots * tile_.rows + row) * kBlockSlots + at % kBlockSlots, &rounded,
                    sizeof rounded);
        return from_bf16(rounded);
    }

    // Scores of a row to p, with the context and the sum of earlier steps brought to the new maximum. Slots that the
    // row does not see are left out by selection: their scores may be NaN.
    void soften(int64_t row, int64_t begin, int64_t slots) {
        float* scores = weight_ + row * kStepStride;
        const int64_t seen = std::clamp<int64_t>(tile_.visible[row] - begin, 0, slots);
        const int64_t whole = round_up(slots, kBlockSlots);
        Floats largest = broadcast(-kInfinity);
        for (int64_t at = 0; at < seen; at += kLanes) {
            largest = max_of(first_lanes(seen - at) ? load(scores + at) : broadcast(-kInfinity), largest);
        }
        const float max = std::max(largest_of(largest), tile_.max[row]);
        Floats sum{};
        for (int64_t at = 0; at < whole; at += kLanes) {
            const int64_t count = std::max<int64_t>(seen - at, 0);
            sum += store_weights(row, at, count, count > 0 ? exp_of(load(scores + at) - max) : Floats{});
        }
        if (seen == 0) return;
        const Floats factor = exp_of(broadcast(tile_.max[row] - max));
        float* context = tile_.context + row * dim_;
        for (int64_t d = 0; d < dim_; d += kLanes) store(context + d, load(context + d) * factor);
        tile_.sum[row] = tile_.sum[row] * factor[0] + sum_of(sum);
        tile_.max[row] = max;
    }

    // Adds p times values to the context, 64 dims at a time, or the last 32.
    void weigh(int64_t blocks) {
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

    const AttentionTile& tile_;
    const int64_t dim_;
    const int64_t end_;  // behind it no row sees anything
    ReadingOrder order_;
    uint16_t* query_;
    uint16_t* last_values_;
    alignas(64) float weight_[kTileRows * kStepStride];     // scores [row][slot of the step]
    alignas(64) uint16_t rounded_[kTileRows * kStepSlots];  // p
};

void attend_tile(const AttentionTile& tile) {
    static const AttentionKernel below = avx512::attention();
    const bool fits = tile.layout.type == CacheType::bf16 && tile.layout.padded_dim() % 32 == 0;
    if (fits && tile.rows >= kLeastRows) {
        Bf16TileRun(tile).run();
    } else {
        below.attend(tile);
    }
}

}  // namespace

AttentionKernel attention() {
    const AttentionKernel below = avx512::attention();
    return {below.append, attend_tile, below.merge};
}

}  // namespace chatglm::CHATGLM_AMX_LEVEL
