#include "bindings.h"
#include "kernels/table.h"

namespace chatglm {

void bind_isa(nanobind::module_& module) {
    module.attr("ISA_LEVELS") = std::vector<std::string>(kIsaNames.begin(), kIsaNames.end());
    module.def(
        "present_isa_levels",
        [] {
            std::vector<std::string> names;
            for (Isa isa : present_levels()) names.emplace_back(name(isa));
            return names;
        },
        "Names of the instruction set levels of this machine, lowest first.");
    module.def(
        "survives_illegal_instruction",
        [] {
            return survives([] {
                __builtin_trap();
                return true;
            });
        },
        "For tests: what a trial of instructions comes to that are not to be had; False.");
    module.def(
        "isa", [] { return std::string(kernels().level); },
        "The level in use: the highest present, or CHATGLM_OV_ISA, for tests also amx_emulated.");
}

}  // namespace chatglm
