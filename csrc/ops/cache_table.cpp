#include "ops/cache_table.h"

#include <algorithm>
#include <vector>

namespace chatglm {
namespace {

// Views on the operation's tensors.
struct Columns {
    int64_t rows, total, fresh;  // B, T, L
    const int32_t* mask;         // [B, T]

    int64_t past() const { return total - fresh; }
    bool real(int64_t row, int64_t column) const { return mask[row * total + column] != 0; }
    int64_t count(int64_t row, int64_t begin, int64_t end) const {
        return std::count_if(mask + row * total + begin, mask + row * total + end, [](int32_t m) { return m != 0; });
    }
};

// A cache row whose slot no sequence refers to: the sequence's own one where it is free. With at least B rows there
// always is one, since each other sequence refers to one row at most.
int32_t free_row(const Columns& columns, const int32_t* table, const std::vector<int64_t>& length, int64_t row,
                 int64_t slot) {
    const auto taken = [&](int32_t candidate) {
        for (int64_t other = 0; other < columns.rows; ++other) {
            if (other != row && slot < length[static_cast<size_t>(other)] && table[other * columns.total + slot] == candidate) return true;
        }
        return false;
    };
    auto candidate = static_cast<int32_t>(row);
    for (int32_t next = 0; taken(candidate); ++next) candidate = next;
    return candidate;
}

}  // namespace

void CacheTable::validate_and_infer_types() {
    check_version();
    check_inputs(4 + static_cast<size_t>(prefix_));
    for (size_t i = 0; i < get_input_size(); ++i) check_type(i, ov::element::i32);
    for (size_t i = 0; i < 3; ++i) check_rank(i, 2);
    set_output_type(0, ov::element::i32, get_input_partial_shape(1));
    set_output_type(1, ov::element::i32, get_input_partial_shape(2));
    set_output_type(2, ov::element::i32, get_input_partial_shape(2));
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
    const int64_t past_rows = dim(inputs[0], 0), past_slots = dim(inputs[0], 1);
    const bool empty = past_rows * past_slots == 0;
    const int32_t* past_table = empty ? nullptr : inputs[0].data<const int32_t>();
    const auto* beam_idx = inputs[3].data<const int32_t>();
    auto* table = outputs[0].data<int32_t>();
    auto *slots = outputs[1].data<int32_t>(), *visible = outputs[2].data<int32_t>();

    std::fill_n(table, columns.rows * columns.total, 0);
    std::vector<int64_t> length(static_cast<size_t>(columns.rows));
    for (int64_t row = 0; row < columns.rows; ++row) {
        length[static_cast<size_t>(row)] = columns.count(row, 0, columns.past());
        if (length[static_cast<size_t>(row)] == 0) continue;
        OPENVINO_ASSERT(beam_idx[row] >= 0 && beam_idx[row] < past_rows && length[static_cast<size_t>(row)] <= past_slots,
                        "CacheTable: row ", row, " goes on from row ", beam_idx[row], " with ", length[static_cast<size_t>(row)],
                        " slots, wanted one of ", past_rows, " rows and at most ", past_slots, " slots");
        std::copy_n(past_table + beam_idx[row] * past_slots, length[static_cast<size_t>(row)], table + row * columns.total);
    }
    const bool fresh_sequences = columns.past() == 0;
    for (int64_t row = 0; row < columns.rows; ++row) {
        for (int64_t i = 0; i < columns.fresh; ++i) {
            int32_t& slot = slots[row * columns.fresh + i];
            if (!columns.real(row, columns.past() + i)) {
                slot = -1;
                continue;
            }
            slot = static_cast<int32_t>(length[static_cast<size_t>(row)]);
            table[row * columns.total + slot] =
                fresh_sequences ? static_cast<int32_t>(row) : free_row(columns, table, length, row, slot);
            ++length[static_cast<size_t>(row)];
        }
    }
    for (int64_t row = 0; row < columns.rows; ++row) {
        const int64_t prefix = prefix_ ? inputs[4].data<const int32_t>()[row] : 0;
        const int64_t open = columns.count(row, 0, std::clamp<int64_t>(prefix, 0, columns.total));
        for (int64_t i = 0; i < columns.fresh; ++i) {
            const int32_t slot = slots[row * columns.fresh + i];
            visible[row * columns.fresh + i] = slot < 0 ? 0 : static_cast<int32_t>(std::max<int64_t>(slot + 1, open));
        }
    }
}

}  // namespace chatglm
