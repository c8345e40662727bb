#include "kernels/table.h"

#include <stdexcept>
#include <string>

#include "kernels/levels.h"

namespace chatglm {

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
    switch (isa) {
        case Isa::avx2: return avx2::table();
        case Isa::avx_vnni: return avx_vnni::table();
        case Isa::avx512: return avx512::table();
        case Isa::avx512_bf16: return avx512_bf16::table();
        default: return amx::table();
    }
}

const KernelTable& kernels_by_name(const std::string& name) {
    if (name != "amx_emulated") return kernels(parse_isa(name));
    kernels(Isa::avx512_bf16);  // what the emulated kernels are compiled for
    return amx_emulated::table();
}

const KernelTable& kernels() {
    static const KernelTable& table = kernels(selected_isa());
    return table;
}

}  // namespace chatglm
