#include "ops/last_rows.h"

#include <algorithm>
#include <cstring>

namespace chatglm {

void LastRows::validate_and_infer_types() {
    check_version();
    check_inputs(2);
    check_type(0, ov::element::f32);
    check_type(1, ov::element::i32);
    check_elements(1, 1);
    const auto& x = get_input_partial_shape(0);
    OPENVINO_ASSERT(x.rank().compatible(3), "LastRows: input 0 of shape ", x, ", wanted [B, L, C]");
    set_output_type(0, ov::element::f32, output_shape(x, [&](size_t input) { return constant_input(input); }));
}

ov::PartialShape LastRows::output_shape(ov::PartialShape x, const KnownNumber& number) const {
    if (x.rank().is_dynamic()) return x;
    const auto count = number(1);
    if (!count || x[1].is_dynamic()) {
        x[1] = ov::Dimension::dynamic();
    } else if (*count > 0) {
        x[1] = std::min<int64_t>(*count, x[1].get_length());
    }
    return x;
}

void LastRows::run(ov::TensorVector& outputs, const ov::TensorVector& inputs, Team&) const {
    OPENVINO_ASSERT(inputs[0].get_shape().size() == 3, "LastRows: input 0 of shape ", inputs[0].get_shape(),
                    ", wanted [B, L, C]");
    check_size(1, inputs[1], 1);
    const auto number = [&](size_t input) { return *inputs[input].data<const int32_t>(); };
    const ov::Shape shape = output_shape(inputs[0].get_shape(), number).to_shape();
    outputs[0].set_shape(shape);
    const size_t rows = static_cast<size_t>(dim(inputs[0], 1)), kept = shape[1], columns = shape[2];
    const float* x = inputs[0].data<const float>();
    float* y = outputs[0].data<float>();
    for (size_t b = 0; b < shape[0]; ++b) {
        std::memcpy(y + b * kept * columns, x + ((b + 1) * rows - kept) * columns, kept * columns * sizeof(float));
    }
}

}  // namespace chatglm
