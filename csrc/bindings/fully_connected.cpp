#include "bindings.h"
#include "ops/fully_connected_run.h"

namespace nb = nanobind;

namespace chatglm {
namespace {

void require(bool fits, const char* message) {
    if (!fits) throw nb::value_error(message);
}

int64_t extent(size_t size) {
    return static_cast<int64_t>(size);
}

nb::ndarray<nb::numpy, float, nb::ndim<2>> fully_connected(const std::string& isa, const PackedLayout& layout,
                                                           Array<uint8_t, 1> payload, Array<float, 2> x,
                                                           int64_t y_features, int activation_bits,
                                                           std::optional<Array<float, 1>> bias,
                                                           const std::string& activation,
                                                           std::optional<Array<float, 2>> residual,
                                                           float residual_scale) {
    const int64_t rows = extent(x.shape(0));
    const bool gated = activation == "silu_gate";
    const int64_t padded = layout.panels() * kPanel;
    require(extent(payload.size()) == layout.bytes(), "payload does not fit the layout");
    require(extent(x.shape(1)) == layout.in_features, "x does not have in_features columns");
    require(!gated || layout.panels() % 2 == 0, "panels are not as many of the gate as of what it multiplies");
    require(y_features > 0 && y_features <= (gated ? padded / 2 : layout.out_features), "y_features is too large");
    require(activation_bits == 8 || activation_bits == 16, "activation_bits is not 8 or 16");
    require(!bias || extent(bias->size()) == padded, "bias does not have 16 values a panel");
    require(!residual || (extent(residual->shape(0)) == rows && extent(residual->shape(1)) == y_features),
            "residual does not have the shape of y");
    Epilogue epilogue;
    epilogue.bias = bias ? bias->data() : nullptr;
    epilogue.activation = parse_activation(activation);
    epilogue.residual = residual ? residual->data() : nullptr;
    epilogue.residual_stride = y_features;
    epilogue.residual_scale = residual_scale;
    float* y = new float[static_cast<size_t>(rows * y_features)];
    nb::capsule owner(y, [](void* p) noexcept { delete[] static_cast<float*>(p); });
    const KernelTable& table = kernels_by_name(isa);
    {
        nb::gil_scoped_release unlocked;
        Team team;
        run_fully_connected(
            table, {layout, payload.data(), activation_bits, rows, x.data(), {}, epilogue, y, y_features}, team);
    }
    return nb::ndarray<nb::numpy, float, nb::ndim<2>>(
        y, {static_cast<size_t>(rows), static_cast<size_t>(y_features)}, owner);
}

}  // namespace

void bind_fully_connected(nb::module_& module) {
    module.def("fully_connected", &fully_connected, nb::arg("isa"), nb::arg("layout"), nb::arg("payload"), nb::arg("x"),
               nb::arg("y_features"), nb::arg("activation_bits") = 16, nb::arg("bias") = nb::none(),
               nb::arg("activation") = "none", nb::arg("residual") = nb::none(), nb::arg("residual_scale") = 1.0f,
               "activation(x W^T + bias) + residual_scale * residual by the kernels of one level.\n\n"
               "payload u8 [layout.bytes], x float32 [rows, in_features], bias float32 [16 * panels], residual and the "
               "result float32 [rows, y_features]. Raises ValueError for shapes that do not fit.");
}

}  // namespace chatglm
