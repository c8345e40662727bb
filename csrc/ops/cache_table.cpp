#include "ops/cache_table.h"

#include <algorithm>
#include <vector>

#include "kernels/cache_layout.h"

namespace chatglm {
namespace {

// The columns of mask and ids. Letters: B rows, T columns, the last L of which are new.
struct Columns {
    int64_t rows, total, fresh;  // B, T, L
    const int32_t* mask;         // [B, T]

    int64_t past() const { return total - fresh; }
    bool real(int64_t row, int64_t column) const { return mask[row * total + column] != 0; }
    int64_t count(int64_t row, int64_t begin, int64_t end) const {
        return std::count_if(mask + row * total + begin, mask + row * total + end, [](int32_t m) { return m != 0; });
    }
};

// What is made: the table [B, blocks], and how many slots each sequence has [B].
struct Table {
    int32_t* rows;
    int64_t blocks;
    std::vector<int64_t> lengths;

    int64_t& length(int64_t row) { return lengths[static_cast<size_t>(row)]; }
    int32_t& at(int64_t row, int64_t block) { return rows[row * blocks + block]; }

    // Whether another sequence has slots in that block of a cache row.
    bool is_shared(int64_t row, int64_t block, int32_t cache_row) {
        for (int64_t other = 0; other < static_cast<int64_t>(lengths.size()); ++other) {
            if (other != row && block * kBlockSlots < length(other) && at(other, block) == cache_row) return true;
        }
        return false;
    }

    // The sequence's own cache row, or the first in which no other one has that block. With at least B rows there
    // always is one, since each other sequence has it in one row at most.
    int32_t free_row(int64_t row, int64_t block) {
        auto candidate = static_cast<int32_t>(row);
        for (int32_t next = 0; is_shared(row, block, candidate); ++next) candidate = next;
        return candidate;
    }
};

// Past blocks of each row: those of the row that it goes on from.
void take_over(const ov::Tensor& past, const int32_t* beam_idx, const Columns& columns, Table& table) {
    const int64_t past_rows = dim(past, 0), past_blocks = dim(past, 1);
    for (int64_t row = 0; row < columns.rows; ++row) {
        const int64_t length = columns.count(row, 0, columns.past()), blocks = blocks_of(length);
        table.length(row) = length;
        if (length == 0) continue;
        OPENVINO_ASSERT(beam_idx[row] >= 0 && beam_idx[row] < past_rows && blocks <= past_blocks, "CacheTable: row ",
                        row, " goes on from row ", beam_idx[row], " with ", length, " slots, wanted one of ", past_rows,
                        " rows and at most ", past_blocks * kBlockSlots, " slots");
        std::copy_n(past.data<const int32_t>() + beam_idx[row] * past_blocks, blocks, &table.at(row, 0));
    }
}

// A slot for each new column [B, L] that is not padding, which has -1; and the row that the first one's block is copied
// from [B]. Of sequences that share a block the last one stays in it: so no row that is copied from is copied to, and
// the copies of a call can be made in any order, before its slots are written.
void place_new(const Columns& columns, Table& table, int32_t* slots, int32_t* copied) {
    for (int64_t row = 0; row < columns.rows; ++row) {
        const int64_t past = table.length(row);
        copied[row] = -1;
        for (int64_t i = 0; i < columns.fresh; ++i) {
            int32_t& slot = slots[row * columns.fresh + i];
            slot = -1;
            if (!columns.real(row, columns.past() + i)) continue;
            slot = static_cast<int32_t>(table.length(row)++);
            const int64_t block = slot / kBlockSlots;
            int32_t& cache_row = table.at(row, block);
            if (slot % kBlockSlots == 0) {
                cache_row = table.free_row(row, block);
            } else if (slot == past && table.is_shared(row, block, cache_row)) {
                copied[row] = cache_row;
                cache_row = table.free_row(row, block);
            }
        }
    }
}

// How many slots each new column [B, L] sees: those up to its own, and all of the prefix [B], if there is one.
void count_visible(const Columns& columns, const int32_t* prefix, const int32_t* slots, int32_t* visible) {
    for (int64_t row = 0; row < columns.rows; ++row) {
        const int64_t prefix_columns = std::clamp<int64_t>(prefix ? prefix[row] : 0, 0, columns.total);
        const int64_t open = columns.count(row, 0, prefix_columns);
        for (int64_t i = row * columns.fresh; i < (row + 1) * columns.fresh; ++i) {
            visible[i] = slots[i] < 0 ? 0 : static_cast<int32_t>(std::max<int64_t>(slots[i] + 1, open));
        }
    }
}

// Of the table, from that of the mask.
ov::PartialShape table_shape(ov::PartialShape mask) {
    if (mask.rank().is_dynamic()) return mask;
    const auto columns = mask[1].get_interval();
    const bool endless = !columns.has_upper_bound();
    mask[1] = ov::Dimension(blocks_of(columns.get_min_val()), endless ? -1 : blocks_of(columns.get_max_val()));
    return mask;
}

}  // namespace

void CacheTable::validate_and_infer_types() {
    check_version();
    check_inputs(4 + static_cast<size_t>(prefix_));
    for (size_t i = 0; i < get_input_size(); ++i) check_type(i, ov::element::i32);
    for (size_t i = 0; i < 3; ++i) check_rank(i, 2);
    set_output_type(0, ov::element::i32, table_shape(get_input_partial_shape(1)));
    set_output_type(1, ov::element::i32, get_input_partial_shape(2));
    set_output_type(2, ov::element::i32, get_input_partial_shape(2));
    set_output_type(3, ov::element::i32, get_input_partial_shape(3));
}

bool CacheTable::visit_attributes(ov::AttributeVisitor& visitor) {
    visitor.on_attribute("prefix", prefix_);
    return Operation::visit_attributes(visitor);
}

void CacheTable::run(ov::TensorVector& outputs, const ov::TensorVector& inputs, Team&) const {
    const Columns columns{dim(inputs[1], 0), dim(inputs[1], 1), dim(inputs[2], 1), inputs[1].data<const int32_t>()};
    OPENVINO_ASSERT(columns.past() >= 0 && dim(inputs[2], 0) == columns.rows, "CacheTable: ids of ",
                    inputs[2].get_shape(), ", wanted ", columns.rows, " rows of at most ", columns.total);
    for (size_t i = 3; i < inputs.size(); ++i) {
        OPENVINO_ASSERT(static_cast<int64_t>(inputs[i].get_size()) == columns.rows, "CacheTable: input ", i, " of ",
                        inputs[i].get_shape(), ", wanted one of each of ", columns.rows, " rows");
    }
    const auto rows = static_cast<size_t>(columns.rows);
    Table table{outputs[0].data<int32_t>(), dim(outputs[0], 1), std::vector<int64_t>(rows)};
    auto* slots = outputs[1].data<int32_t>();
    std::fill_n(table.rows, columns.rows * table.blocks, 0);
    take_over(inputs[0], inputs[3].data<const int32_t>(), columns, table);
    place_new(columns, table, slots, outputs[3].data<int32_t>());
    count_visible(columns, prefix_ ? inputs[4].data<const int32_t>() : nullptr, slots, outputs[2].data<int32_t>());
}

}  // namespace chatglm
