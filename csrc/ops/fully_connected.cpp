#include "ops/fully_connected.h"

#include "ops/fully_connected_run.h"

namespace chatglm {

void FullyConnected::validate_and_infer_types() {
    check_version();
    OPENVINO_ASSERT(norm_ == "none" || norm_ == "rms" || norm_ == "layer", "FullyConnected: norm '", norm_,
                    "', wanted none, rms or layer");
    OPENVINO_ASSERT((bias_ == 0 || bias_ == 1) && (residual_ == 0 || residual_ == 1), "FullyConnected: bias ", bias_,
                    ", residual ", residual_, ", wanted 0 or 1");
    const size_t norm_inputs = norm_ == "none" ? 0 : norm_ == "rms" ? 1 : 2;
    const size_t first_of_norm = 2 + static_cast<size_t>(bias_ + residual_);
    check_inputs(first_of_norm + norm_inputs);
    const auto [packed, activation] = or_throw("FullyConnected", [&] {
        weight_.layout().check();
        return std::make_pair(weight_.layout(), parse_activation(activation_));
    });
    const int64_t padded = packed.panels() * kPanel;
    const int64_t most = activation == Activation::silu_gate ? padded / 2 : weight_.out_features;
    OPENVINO_ASSERT(activation != Activation::silu_gate || packed.panels() % 2 == 0, "FullyConnected: ",
                    packed.panels(), " panels of a gate and what it multiplies, wanted as many of one as of the other");
    OPENVINO_ASSERT(y_features_ > 0 && y_features_ <= most, "FullyConnected: y_features ", y_features_,
                    ", wanted 1 to ", most);
    OPENVINO_ASSERT(activation_bits_ == 8 || activation_bits_ == 16, "FullyConnected: activation_bits ",
                    activation_bits_, ", wanted 8 or 16");
    check_type(0, ov::element::f32);
    check_type(1, ov::element::u8);
    check_last_dim(0, weight_.in_features);
    check_elements(1, packed.bytes());
    if (bias_) check_elements(2, padded);
    if (residual_) check_last_dim(static_cast<size_t>(2 + bias_), y_features_);
    for (size_t i = 0; i < norm_inputs; ++i) {
        check_type(first_of_norm + i, ov::element::f32);
        check_elements(first_of_norm + i, weight_.in_features);
    }
    set_output_type(0, ov::element::f32, output_shape(get_input_partial_shape(0), {}));
}

ov::PartialShape FullyConnected::output_shape(ov::PartialShape x, const KnownNumber&) const {
    if (x.rank().is_static()) x[x.size() - 1] = y_features_;
    return x;
}

bool FullyConnected::visit_attributes(ov::AttributeVisitor& visitor) {
    weight_.visit(visitor);
    visitor.on_attribute("y_features", y_features_);
    visitor.on_attribute("activation", activation_);
    visitor.on_attribute("bias", bias_);
    visitor.on_attribute("residual", residual_);
    visitor.on_attribute("residual_scale", residual_scale_);
    visitor.on_attribute("activation_bits", activation_bits_);
    visitor.on_attribute("norm", norm_);
    visitor.on_attribute("norm_eps", norm_eps_);
    return Operation::visit_attributes(visitor);
}

void FullyConnected::run(ov::TensorVector& outputs, const ov::TensorVector& inputs, Team& team) const {
    const ov::Tensor& x = inputs[0];
    const PackedLayout layout = weight_.layout();
    const int64_t rows = static_cast<int64_t>(x.get_size()) / layout.in_features;
    OPENVINO_ASSERT(static_cast<int64_t>(x.get_shape().back()) == layout.in_features, "FullyConnected: x of ",
                    x.get_shape(), ", wanted ", layout.in_features, " columns");
    check_size(1, inputs[1], layout.bytes());
    if (bias_) check_size(2, inputs[2], layout.panels() * kPanel);
    Epilogue epilogue;
    epilogue.activation = parse_activation(activation_);
    epilogue.bias = bias_ ? inputs[2].data<const float>() : nullptr;
    if (residual_) {
        const ov::Tensor& residual = inputs[static_cast<size_t>(2 + bias_)];
        OPENVINO_ASSERT(static_cast<int64_t>(residual.get_size()) == rows * y_features_,
                        "FullyConnected: a residual of ", residual.get_shape(), ", wanted ", rows, " rows of ",
                        y_features_);
        epilogue.residual = residual.data<const float>();
        epilogue.residual_stride = y_features_;
        epilogue.residual_scale = residual_scale_;
    }
    RowNorm norm;
    if (norm_ != "none") {
        const size_t first = 2 + static_cast<size_t>(bias_ + residual_);
        for (size_t i = first; i < inputs.size(); ++i) check_size(i, inputs[i], layout.in_features);
        norm.weight = inputs[first].data<const float>();
        norm.bias = norm_ == "layer" ? inputs[first + 1].data<const float>() : nullptr;
        norm.eps = norm_eps_;
    }
    FullyConnectedCall call{};
    call.layout = layout;
    call.weight = inputs[1].data<const uint8_t>();
    call.activation_bits = static_cast<int>(activation_bits_);
    call.rows = rows;
    call.x = x.data<const float>();
    call.norm = norm;
    call.epilogue = epilogue;
    call.y = outputs[0].data<float>();
    call.y_features = y_features_;
    run_fully_connected(kernels(), call, team);
}

}  // namespace chatglm
