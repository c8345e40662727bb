#include "ops/norm.h"

#include "ops/row_norm.h"

namespace chatglm {

void Norm::validate_and_infer_types() {
    check_version();
    OPENVINO_ASSERT(kind_ == "rms" || kind_ == "layer", "Norm: kind '", kind_, "', wanted rms or layer");
    check_inputs(kind_ == "rms" ? 2 : 3);
    for (size_t i = 0; i < get_input_size(); ++i) check_type(i, ov::element::f32);
    set_output_type(0, ov::element::f32, get_input_partial_shape(0));
}

bool Norm::visit_attributes(ov::AttributeVisitor& visitor) {
    visitor.on_attribute("kind", kind_);
    visitor.on_attribute("eps", eps_);
    return Operation::visit_attributes(visitor);
}

void Norm::run(ov::TensorVector& outputs, const ov::TensorVector& inputs, Team& team) const {
    const auto& kernel = kernels().elementwise;
    const int64_t size = static_cast<int64_t>(inputs[1].get_size());
    const int64_t rows = static_cast<int64_t>(inputs[0].get_size()) / size;
    const RowNorm norm{inputs[1].data<const float>(), kind_ == "layer" ? inputs[2].data<const float>() : nullptr, eps_};
    const auto* x = inputs[0].data<const float>();
    float* y = outputs[0].data<float>();
    team.pieces(rows, 4, 2, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) norm.apply(kernel, x + i * size, size, y + i * size);
    });
}

}  // namespace chatglm
