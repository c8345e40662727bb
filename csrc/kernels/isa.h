// Instruction set levels: what each needs, which one this process uses.
#pragma once

#include <array>
#include <string>
#include <vector>

namespace chatglm {

// In rising order: the later is the faster where a processor has both. Each needs what AVX2 does.
enum class Isa {
    avx2,         // AVX2, FMA, F16C
    avx_vnni,     // + AVX-VNNI
    avx512,       // AVX2 + AVX-512 F, BW, DQ, VL, VNNI
    avx512_bf16,  // + AVX-512 BF16
    amx,          // + AMX tiles, int8, bf16, with the permission of the system
};

constexpr std::array<const char*, 5> kIsaNames{"avx2", "avx_vnni", "avx512", "avx512_bf16", "amx"};

inline const char* name(Isa isa) {
    return kIsaNames[static_cast<size_t>(isa)];
}

// What `trial` returns; false where it meets an instruction that is not to be had (SIGILL). Not by two threads at once.
bool survives(bool (*trial)());

// Whether this processor and system run a level. AMX is tried with one tile, because flags do not tell of limits
// that a virtual machine or the system sets.
bool is_present(Isa isa);

// All levels present, lowest first; empty on a processor without AVX2.
std::vector<Isa> present_levels();

// Whether weights that are read once are best asked for a page ahead (streams-inl.h): on AMD's family 19h, measured on
// Zen 4.
bool prefers_page_reach();

// The level of this name. Throws std::invalid_argument that lists the names.
Isa parse_isa(const std::string& name);

// The level in use: the highest present one, or the one that CHATGLM_OV_ISA names. Throws std::runtime_error when
// that one, or every level, is absent.
Isa selected_isa();

}  // namespace chatglm
