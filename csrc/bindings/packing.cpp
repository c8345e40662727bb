#include "bindings.h"
#include "kernels/packing.h"

namespace nb = nanobind;

namespace chatglm {
namespace {

PackedLayout layout_of(const std::string& format, int64_t out_features, int64_t in_features, int64_t group_size) {
    const PackedLayout layout{parse_format(format), out_features, in_features, group_size};
    layout.check();
    return layout;
}

}  // namespace

void bind_packing(nb::module_& module) {
    module.attr("PACKING_VERSION") = kPackingVersion;
    module.attr("PANEL") = kPanel;
    nb::class_<PackedLayout>(module, "PackedLayout", "Sizes of a packed weight, in bytes; csrc/kernels/packing.h.")
        .def("__init__",
             [](PackedLayout* self, const std::string& format, int64_t out_features, int64_t in_features,
                int64_t group_size) {
                 new (self) PackedLayout(layout_of(format, out_features, in_features, group_size));
             },
             nb::arg("format"), nb::arg("out_features"), nb::arg("in_features"), nb::arg("group_size") = 0)
        .def_ro("out_features", &PackedLayout::out_features)
        .def_ro("in_features", &PackedLayout::in_features)
        .def_ro("group_size", &PackedLayout::group_size)
        .def_prop_ro("panels", &PackedLayout::panels)
        .def_prop_ro("padded_in", &PackedLayout::padded_in)
        .def_prop_ro("panel_bytes", &PackedLayout::panel_bytes)
        .def_prop_ro("scale_offset", &PackedLayout::scale_offset)
        .def_prop_ro("zero_point_offset", &PackedLayout::zero_point_offset)
        .def_prop_ro("bytes", &PackedLayout::bytes)
        .def(
            "pack",
            [](const PackedLayout& self, nb::ndarray<nb::c_contig, nb::device::cpu> codes,
               MutableArray<uint8_t, 1> out) {
                const int64_t width = self.format == WeightFormat::f32 ? 4 : self.format == WeightFormat::bf16 ? 2 : 1;
                const bool fits = codes.ndim() == 2 && static_cast<int64_t>(codes.shape(1)) == self.in_features &&
                                  static_cast<int64_t>(codes.itemsize()) == width;
                const int64_t rows = fits ? static_cast<int64_t>(codes.shape(0)) : 0;
                const int64_t wanted = round_up(rows, kPanel) / kPanel * self.panel_bytes();
                if (!fits || static_cast<int64_t>(out.size()) != wanted) {
                    throw nb::value_error("pack: arrays do not fit the layout");
                }
                nb::gil_scoped_release unlocked;
                pack_codes(self, codes.data(), rows, out.data());
            },
            nb::arg("codes"), nb::arg("out"),
            "codes [n, in_features] (f32, bf16 bits as uint16, int8, one 4-bit code a byte) -> out u8 "
            "[ceil(n / 16) * panel_bytes], the codes section of these rows.")
        .def(
            "unpack_row",
            [](const PackedLayout& self, Array<uint8_t, 1> payload, int64_t row, MutableArray<float, 1> out) {
                if (static_cast<int64_t>(payload.size()) != self.bytes() || row < 0 || row >= self.out_features ||
                    static_cast<int64_t>(out.size()) != self.in_features) {
                    throw nb::value_error("unpack_row: arrays do not fit the layout");
                }
                unpack_row(self, payload.data(), row, out.data());
            },
            nb::arg("payload"), nb::arg("row"), nb::arg("out"), "One output feature as float32 [in_features].");
}

}  // namespace chatglm
