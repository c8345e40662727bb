#include "ops/embedding.h"

#include <cstring>

#include "kernels/half.h"

namespace chatglm {
namespace {

ov::PartialShape with_dim(ov::PartialShape ids, int64_t size) {
    if (ids.rank().is_static()) ids.push_back(size);
    return ids;
}

// Calls write(id, row of the output) for every id [B, L], which has to be one of `rows`.
template <typename Write>
void for_each_id(const char* operation, const ov::Tensor& ids, int64_t rows, ov::Tensor& output, int64_t columns,
                 Team& team, const Write& write) {
    const auto* first = ids.data<const int32_t>();
    const auto count = static_cast<int64_t>(ids.get_size());
    for (int64_t i = 0; i < count; ++i) {
        OPENVINO_ASSERT(first[i] >= 0 && first[i] < rows, operation, ": token id ", first[i], ", wanted 0 to ",
                        rows - 1);
    }
    float* y = output.data<float>();
    team.pieces(count, 1, 4, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) write(first[i], y + i * columns);
    });
}

void unpack(const ov::Tensor& weight, const ov::TensorVector& inputs, int64_t id, int64_t columns, float* y) {
    if (weight.get_element_type() == ov::element::f32) {
        std::memcpy(y, weight.data<const float>() + id * columns, static_cast<size_t>(columns) * sizeof(float));
    } else if (weight.get_element_type() == ov::element::bf16) {
        const auto* row = static_cast<const uint16_t*>(weight.data()) + id * columns;
        for (int64_t k = 0; k < columns; ++k) y[k] = float_of_bf16(row[k]);
    } else {
        const int8_t* row = weight.data<const int8_t>() + id * columns;
        const float scale = inputs[2].data<const float>()[id];
        for (int64_t k = 0; k < columns; ++k) y[k] = static_cast<float>(row[k]) * scale;
    }
}

}  // namespace

void Embedding::validate_and_infer_types() {
    check_version();
    check_inputs(2);
    or_throw("Embedding", [&] { return weight_.layout().check(), 0; });
    check_type(0, ov::element::i32);
    check_type(1, ov::element::u8);
    check_elements(1, weight_.layout().bytes());
    set_output_type(0, ov::element::f32, output_shape(get_input_partial_shape(0), {}));
}

ov::PartialShape Embedding::output_shape(ov::PartialShape ids, const KnownNumber&) const {
    return with_dim(std::move(ids), weight_.in_features);
}

bool Embedding::visit_attributes(ov::AttributeVisitor& visitor) {
    weight_.visit(visitor);
    return Operation::visit_attributes(visitor);
}

void Embedding::run(ov::TensorVector& outputs, const ov::TensorVector& inputs, Team& team) const {
    check_size(1, inputs[1], weight_.layout().bytes());
    const auto* payload = inputs[1].data<const uint8_t>();
    for_each_id("Embedding", inputs[0], weight_.out_features, outputs[0], weight_.in_features, team,
                [&](int64_t id, float* y) { unpack_row(weight_.layout(), payload, id, y); });
}

void EmbeddingRows::validate_and_infer_types() {
    check_version();
    OPENVINO_ASSERT(get_input_size() == 2 || get_input_size() == 3, "EmbeddingRows: ", get_input_size(),
                    " inputs, wanted 2 or 3");
    check_type(0, ov::element::i32);
    OPENVINO_ASSERT(hidden_size_ > 0, "EmbeddingRows: hidden_size ", hidden_size_, ", wanted a positive number");
    const auto type = get_input_element_type(1);
    const bool scaled = get_input_size() == 3;
    OPENVINO_ASSERT(scaled ? type == ov::element::i8 : type == ov::element::f32 || type == ov::element::bf16,
                    "EmbeddingRows: a weight of ", type, ", wanted f32 or bf16, or i8 with scales");
    const auto& weight = get_input_partial_shape(1);
    check_rank(1, 2);
    check_last_dim(1, hidden_size_);
    if (scaled) {
        check_type(2, ov::element::f32);
        if (weight.is_static()) check_elements(2, weight[0].get_length());
    }
    set_output_type(0, ov::element::f32, output_shape(get_input_partial_shape(0), {}));
}

ov::PartialShape EmbeddingRows::output_shape(ov::PartialShape ids, const KnownNumber&) const {
    return with_dim(std::move(ids), hidden_size_);
}

bool EmbeddingRows::visit_attributes(ov::AttributeVisitor& visitor) {
    visitor.on_attribute("hidden_size", hidden_size_);
    return Operation::visit_attributes(visitor);
}

void EmbeddingRows::run(ov::TensorVector& outputs, const ov::TensorVector& inputs, Team& team) const {
    const int64_t rows = dim(inputs[1], 0);
    check_size(1, inputs[1], rows * hidden_size_);
    if (inputs.size() == 3) check_size(2, inputs[2], rows);
    for_each_id("EmbeddingRows", inputs[0], rows, outputs[0], hidden_size_, team,
                [&](int64_t id, float* y) { unpack(inputs[1], inputs, id, hidden_size_, y); });
}

}  // namespace chatglm
