#include "ops/norm.h"

#include "ops/row_norm.h"

namespace chatglm {

void Norm::validate_and_infer_types() {
    check_version();
    OPENVINO_ASSERT(kind_ == "rms" || kind_ == "layer", "Norm: kind '", kind_, "', wanted rms or layer");
    OPENVINO_ASSERT(residual_ == 0 || residual_ == 1, "Norm: residual ", residual_, ", wanted 0 or 1");
    check_inputs((kind_ == "rms" ? 2 : 3) + static_cast<size_t>(residual_));
    for (size_t i = 0; i < get_input_size(); ++i) check_type(i, ov::element::f32);
    const auto& weight = get_input_partial_shape(1);
    if (weight.is_static()) {
        const auto size = static_cast<int64_t>(ov::shape_size(weight.to_shape()));
        OPENVINO_ASSERT(size > 0, "Norm: a weight of shape ", weight, ", wanted one of each column");
        check_last_dim(0, size);
        if (kind_ == "layer") check_elements(2, size);
    }
    if (residual_) {
        const auto &x = get_input_partial_shape(0), &residual = get_input_partial_shape(get_input_size() - 1);
        OPENVINO_ASSERT(x.compatible(residual), "Norm: a residual of shape ", residual, ", wanted ", x);
    }
    set_output_type(0, ov::element::f32, get_input_partial_shape(0));
}

bool Norm::visit_attributes(ov::AttributeVisitor& visitor) {
    visitor.on_attribute("kind", kind_);
    visitor.on_attribute("eps", eps_);
    visitor.on_attribute("residual", residual_);
    return Operation::visit_attributes(visitor);
}

void Norm::run(ov::TensorVector& outputs, const ov::TensorVector& inputs, Team& team) const {
    const auto& kernel = kernels().elementwise;
    const int64_t size = static_cast<int64_t>(inputs[1].get_size());
    OPENVINO_ASSERT(size > 0 && inputs[0].get_shape().back() == inputs[1].get_size(), "Norm: x of ",
                    inputs[0].get_shape(), ", wanted ", size, " columns");
    const int64_t rows = static_cast<int64_t>(inputs[0].get_size()) / size;
    if (kind_ == "layer") check_size(2, inputs[2], size);
    if (residual_) check_size(inputs.size() - 1, inputs.back(), rows * size);
    const RowNorm norm{inputs[1].data<const float>(), kind_ == "layer" ? inputs[2].data<const float>() : nullptr, eps_};
    const auto* x = inputs[0].data<const float>();
    const float* residual = residual_ ? inputs.back().data<const float>() : nullptr;
    float* y = outputs[0].data<float>();
    team.pieces(rows, 4, 2, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            norm.apply(kernel, x + i * size, size, y + i * size);
            for (int64_t k = i * size; residual != nullptr && k < (i + 1) * size; ++k) y[k] += residual[k];
        }
    });
}

}  // namespace chatglm
