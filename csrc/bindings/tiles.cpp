// The emulation of AMX tiles, for the tests of what the tests of the kernels rest on.

#include "bindings.h"
#include "kernels/amx/tiles_emulated.h"

namespace nb = nanobind;

namespace chatglm {
namespace {

using TileBytes = nb::ndarray<const uint8_t, nb::shape<16, 64>, nb::c_contig, nb::device::cpu>;
using MutableTileBytes = nb::ndarray<uint8_t, nb::shape<16, 64>, nb::c_contig, nb::device::cpu>;

void tile_product(const std::string& kind, nb::bytes configuration, TileBytes a, TileBytes b, MutableTileBytes sum) {
    if (configuration.size() != 64) throw nb::value_error("configuration does not have 64 bytes");
    tiles_emulated::configure(configuration.c_str());
    tiles_emulated::load(0, sum.data(), 64);
    tiles_emulated::load(4, a.data(), 64);
    tiles_emulated::load(6, b.data(), 64);
    if (kind == "bf16") {
        tiles_emulated::dot_bf16(0, 4, 6);
    } else if (kind == "s8_s8") {
        tiles_emulated::dot_int8<int8_t, int8_t>(0, 4, 6);
    } else if (kind == "s8_u8") {
        tiles_emulated::dot_int8<int8_t, uint8_t>(0, 4, 6);
    } else {
        throw nb::value_error(("kind: '" + kind + "', wanted one of bf16, s8_s8, s8_u8").c_str());
    }
    tiles_emulated::store(0, sum.data(), 64);
    tiles_emulated::release();
}

}  // namespace

void bind_tiles(nb::module_& module) {
    module.def("tile_product", &tile_product, nb::arg("kind"), nb::arg("configuration"), nb::arg("a"), nb::arg("b"),
               nb::arg("sum"),
               "Emulates one AMX tile product: sum (tile 0) += a (tile 4) times b (tile 6), each u8 [16, 64], under a "
               "configuration of 64 bytes. Raises RuntimeError where the processor would raise an exception.");
    module.def(
        "zero_unconfigured_tile", [] { tiles_emulated::zero(0); },
        "Emulates an access to a tile without a configuration: raises RuntimeError.");
}

}  // namespace chatglm
