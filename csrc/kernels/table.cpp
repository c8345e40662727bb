#include "kernels/table.h"

#include <array>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels/levels.h"

namespace chatglm {
namespace {

constexpr char kEmulated[] = "amx_emulated";

}  // namespace

Activation parse_activation(const std::string& name) {
    if (name == "none") return Activation::none;
    if (name == "gelu_tanh") return Activation::gelu_tanh;
    if (name == "silu_gate") return Activation::silu_gate;
    throw std::invalid_argument("activation: '" + name + "', wanted one of none, gelu_tanh, silu_gate");
}

const KernelTable& kernels(Isa isa) {
    if (!is_present(isa)) {
        throw std::runtime_error("instruction set: '" + std::string(name(isa)) + "' is not on this machine");
    }
    using Table = const KernelTable& (*)();
    static constexpr std::array<Table, kIsaNames.size()> kTables{avx2::table, avx_vnni::table, avx512::table,
                                                                 avx512_bf16::table, amx::table};
    return kTables[static_cast<size_t>(isa)]();
}

const KernelTable& kernels_by_name(const std::string& name) {
    if (name != kEmulated) return kernels(parse_isa(name));
    kernels(Isa::avx512_bf16);  // what the emulated kernels are compiled for
    return amx_emulated::table();
}

const KernelTable& kernels() {
    static const KernelTable& table = []() -> const KernelTable& {
        const char* forced = std::getenv("CHATGLM_OV_ISA");
        const bool emulated = forced != nullptr && std::string(forced) == kEmulated;
        return emulated ? kernels_by_name(kEmulated) : kernels(selected_isa());
    }();
    return table;
}

}  // namespace chatglm
