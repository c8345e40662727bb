#include "ops/rotary_embedding.h"

#include "kernels/table.h"

namespace chatglm {

void RotaryEmbedding::validate_and_infer_types() {
    check_version();
    check_inputs(3);
    for (size_t i = 0; i < 3; ++i) check_type(i, ov::element::f32);
    const auto& shape = get_input_partial_shape(0);
    const auto& angles = get_input_partial_shape(1);
    OPENVINO_ASSERT(head_dim_ > 0, "RotaryEmbedding: head_dim ", head_dim_, ", wanted a positive number");
    for (size_t i = 0; i < 3; ++i) check_rank(i, 3);
    if (shape.rank().is_static() && shape[2].is_static()) {
        OPENVINO_ASSERT(shape[2].get_length() % head_dim_ == 0, "RotaryEmbedding: x of shape ", shape,
                        ", wanted a last dimension that is a multiple of head_dim ", head_dim_);
    }
    if (angles.rank().is_static() && angles[2].is_static()) {
        OPENVINO_ASSERT(2 * angles[2].get_length() <= head_dim_, "RotaryEmbedding: ", angles[2].get_length(),
                        " angles, wanted at most half of head_dim ", head_dim_);
    }
    set_output_type(0, ov::element::f32, shape);
}

bool RotaryEmbedding::visit_attributes(ov::AttributeVisitor& visitor) {
    visitor.on_attribute("head_dim", head_dim_);
    return Operation::visit_attributes(visitor);
}

void RotaryEmbedding::run(ov::TensorVector& outputs, const ov::TensorVector& inputs, Team& team) const {
    const auto rotate = kernels().elementwise.rotate;
    const ov::Shape &of_x = inputs[0].get_shape(), &of_cos = inputs[1].get_shape();
    OPENVINO_ASSERT(of_x.size() == 3 && of_cos.size() == 3 && of_cos[0] == of_x[0] && of_cos[1] == of_x[1] &&
                        inputs[2].get_shape() == of_cos && 2 * static_cast<int64_t>(of_cos[2]) <= head_dim_ &&
                        static_cast<int64_t>(of_x[2]) % head_dim_ == 0,
                    "RotaryEmbedding: x of ", of_x, ", angles of ", of_cos, " and ", inputs[2].get_shape(),
                    ", wanted heads of ", head_dim_, " and their angles for each token");
    const int64_t tokens = dim(inputs[0], 0) * dim(inputs[0], 1), width = dim(inputs[0], 2), half = dim(inputs[1], 2);
    const auto* x = inputs[0].data<const float>();
    const auto *cos = inputs[1].data<const float>(), *sin = inputs[2].data<const float>();
    float* y = outputs[0].data<float>();
    team.pieces(tokens, 1, 4, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
            for (int64_t d = 0; d < width; d += head_dim_) {
                const int64_t at = t * width + d;
                rotate(x + at, cos + t * half, sin + t * half, half, head_dim_, 1.0f, y + at);
            }
        }
    });
}

}  // namespace chatglm
