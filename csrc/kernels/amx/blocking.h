// How the FullyConnected kernels of this level walk over weights.
//
// The columns of x are cut into blocks whose rows, prepared as A tiles, fit in L2 (at most 512 KB for 512 rows). Two
// panels of weights, a pair, are multiplied with all rows of a block before the next pair is touched, so that a weight
// comes from memory once and then from L1. A group of pairs goes through block after block: their sums stay in L2.
#pragma once

#include <algorithm>

#include "kernels/amx/tiles.h"
#include "kernels/packing.h"

namespace chatglm::CHATGLM_AMX_LEVEL {
namespace {

constexpr int64_t kTileSide = 16;
constexpr int64_t kTileBytes = kTileSide * 64;
constexpr int64_t kPairFeatures = 2 * kPanel;

// Fewer rows go to the kernels below: a tile product costs the same with less rows in it. To be measured on a machine
// with AMX; a full tile of rows is the least for which the products alone certainly win.
constexpr int64_t kLeastRows = 16;

// 8 pairs x 512 rows x 128 bytes of sums: 512 KB of an L2 of 2 MB.
constexpr int64_t kGroupPairs = 8;

// Below this size all prepared rows stay in L2, and a pair goes through all blocks at once.
constexpr int64_t kResidentBytes = 512 << 10;

inline int64_t pairs_of_group(int64_t prepared_bytes) {
    return prepared_bytes <= kResidentBytes ? 1 : kGroupPairs;
}

// How a weight is cut: into blocks of so many columns, the last one maybe shorter.
struct Blocks {
    int64_t padded_in, columns;

    int64_t count() const { return (padded_in + columns - 1) / columns; }
    int64_t columns_of(int64_t block) const { return std::min(columns, padded_in - block * columns); }
};

// The part of a pair of panels in one block of columns; the second panel is the first again where there is no other.
struct PairBlock {
    int64_t panel, panels, block;
};

// The pair that starts with a panel, of those before `end`.
inline PairBlock pair_before(int64_t end, int64_t panel, int64_t block) {
    return {panel, std::clamp<int64_t>(end - panel, 0, 2), block};
}

// Visits the pairs of the panels [begin, end) in the order above: visit(current, first panel of its group, next), where
// next.panels is 0 at the very end; then done(first, last) with the panels of a group, whose sums are complete.
template <typename Visit, typename Done>
void walk(int64_t begin, int64_t end, int64_t blocks, int64_t group_pairs, const Visit& visit, const Done& done) {
    for (int64_t first = begin; first < end; first += 2 * group_pairs) {
        const int64_t last = std::min(first + 2 * group_pairs, end);
        for (int64_t block = 0; block < blocks; ++block) {
            for (int64_t panel = first; panel < last; panel += 2) {
                const bool is_last_pair = panel + 2 >= last, is_last_block = block + 1 == blocks;
                const PairBlock next = !is_last_pair    ? pair_before(end, panel + 2, block)
                                       : !is_last_block ? pair_before(end, first, block + 1)
                                                        : pair_before(end, last, 0);
                visit(pair_before(end, panel, block), first, next);
            }
        }
        done(first, last);
    }
}

}  // namespace
}  // namespace chatglm::CHATGLM_AMX_LEVEL
