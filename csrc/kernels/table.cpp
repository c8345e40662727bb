#include "kernels/table.h"

#include <stdexcept>
#include <string>

#include "kernels/levels.h"

namespace chatglm {

const KernelTable& kernels(Isa isa) {
    if (!is_present(isa)) {
        throw std::runtime_error("instruction set: '" + std::string(name(isa)) + "' is not on this machine");
    }
    switch (isa) {
        case Isa::avx2: return avx2::table();
        case Isa::avx512: return avx512::table();
        case Isa::avx512_bf16: return avx512_bf16::table();
        default: return amx::table();
    }
}

const KernelTable& kernels() {
    static const KernelTable& table = kernels(selected_isa());
    return table;
}

}  // namespace chatglm
