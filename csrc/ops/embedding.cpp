#include "ops/embedding.h"


namespace chatglm {

void Embedding::validate_and_infer_types() {
    check_version();
    check_inputs(2);
    or_throw("Embedding", [&] { return weight_.layout().check(), 0; });
    check_type(0, ov::element::i32);
    check_type(1, ov::element::u8);
    check_elements(1, weight_.layout().bytes());
    auto shape = get_input_partial_shape(0);
    if (shape.rank().is_static()) shape.push_back(weight_.in_features);
    set_output_type(0, ov::element::f32, shape);
}

bool Embedding::visit_attributes(ov::AttributeVisitor& visitor) {
    weight_.visit(visitor);
    return Operation::visit_attributes(visitor);
}

void Embedding::run(ov::TensorVector& outputs, const ov::TensorVector& inputs, Team& team) const {
    const auto* ids = inputs[0].data<const int32_t>();
    const auto* payload = inputs[1].data<const uint8_t>();
    float* y = outputs[0].data<float>();
    const int64_t count = static_cast<int64_t>(inputs[0].get_size());
    for (int64_t i = 0; i < count; ++i) {
        OPENVINO_ASSERT(ids[i] >= 0 && ids[i] < weight_.out_features, "Embedding: token id ", ids[i], ", wanted 0 to ",
                        weight_.out_features - 1);
    }
    team.pieces(count, 1, 4, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            unpack_row(weight_.layout(), payload, ids[i], y + i * weight_.in_features);
        }
    });
}

}  // namespace chatglm
