#include "kernels/isa.h"

#include <cpuid.h>
#include <csetjmp>
#include <csignal>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

#include "kernels/amx/trial.h"

namespace chatglm {
namespace {

// Bit 29 of ECX of CPUID leaf 1; Clang does not know it by name before release 19.
bool has_f16c() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & 1u << 29) != 0;
}

bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}

// Bit 4 of EAX of CPUID leaf 7, subleaf 1.
bool has_avx_vnni() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return has_avx2() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & 1u << 4) != 0;
}

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
}

bool has_avx512_bf16() {
    return has_avx512() && __builtin_cpu_supports("avx512bf16");
}

// Bits 22, 24, 25 of CPUID leaf 7: amx-bf16, amx-tile, amx-int8.
bool has_amx_flags() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    constexpr unsigned kNeeded = 1u << 22 | 1u << 24 | 1u << 25;
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kNeeded) == kNeeded;
}

// Linux gives a process the use of tile data on request only.
bool request_amx_permission() {
    constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
    constexpr long kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool has_amx() {
    return has_avx512_bf16() && has_amx_flags() && request_amx_permission() && survives(amx::one_tile_trial);
}

// In a virtual machine each CPUID goes through the hypervisor: microseconds, so this is asked once.
bool is_amd_family(unsigned wanted) {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    __get_cpuid(0, &eax, &ebx, &ecx, &edx);
    const bool amd = ebx == signature_AMD_ebx && ecx == signature_AMD_ecx && edx == signature_AMD_edx;
    __get_cpuid(1, &eax, &ebx, &ecx, &edx);
    const unsigned family = (eax >> 8 & 0xf) + (eax >> 20 & 0xff);
    return amd && family == wanted;
}

std::string names_of(const std::vector<Isa>& levels) {
    std::string joined;
    for (Isa isa : levels) joined += (joined.empty() ? "" : ", ") + std::string(name(isa));
    return joined.empty() ? "none" : joined;
}

std::vector<Isa> all_levels() {
    std::vector<Isa> levels;
    for (size_t i = 0; i < kIsaNames.size(); ++i) levels.push_back(static_cast<Isa>(i));
    return levels;
}

}  // namespace

bool survives(bool (*trial)()) {
    static sigjmp_buf before;
    static pthread_t trying;
    trying = pthread_self();
    struct sigaction leave {}, kept {};
    leave.sa_handler = [](int) {
        if (pthread_equal(pthread_self(), trying)) siglongjmp(before, 1);
        // Another thread's own fault ends the process as it would have: the instruction is met again.
        std::signal(SIGILL, SIG_DFL);
    };
    if (sigaction(SIGILL, &leave, &kept) != 0) return false;
    volatile bool passed = false;
    if (sigsetjmp(before, 1) == 0) passed = trial();
    sigaction(SIGILL, &kept, nullptr);
    return passed;
}

// AMX is tried only where it is asked for: not where a lower level is forced.
bool is_present(Isa isa) {
    if (isa == Isa::amx) {
        static const bool present = has_amx();
        return present;
    }
    static const std::array<bool, kIsaNames.size()> present{has_avx2(), has_avx_vnni(), has_avx512(),
                                                            has_avx512_bf16()};
    return present[static_cast<size_t>(isa)];
}

bool prefers_page_reach() {
    static const bool prefers = is_amd_family(0x19);
    return prefers;
}

std::vector<Isa> present_levels() {
    std::vector<Isa> levels = all_levels();
    levels.erase(std::remove_if(levels.begin(), levels.end(), [](Isa isa) { return !is_present(isa); }), levels.end());
    return levels;
}

Isa parse_isa(const std::string& wanted) {
    for (Isa isa : all_levels()) {
        if (wanted == name(isa)) return isa;
    }
    throw std::invalid_argument("instruction set: '" + wanted + "', wanted one of " + names_of(all_levels()));
}

Isa selected_isa() {
    if (!is_present(Isa::avx2)) {
        throw std::runtime_error("processor: no AVX2, wanted one of " + names_of(all_levels()));
    }
    const char* forced = std::getenv("CHATGLM_OV_ISA");
    if (forced == nullptr || *forced == '\0') {
        return present_levels().back();
    }
    const Isa isa = parse_isa(forced);
    if (!is_present(isa)) {
        throw std::runtime_error("CHATGLM_OV_ISA: '" + std::string(forced) +
                                 "' is not on this machine, wanted one of " + names_of(present_levels()));
    }
    return isa;
}

}  // namespace chatglm
