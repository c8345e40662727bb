// AMX tiles: the eight instructions that the kernels use, and what names the level that is compiled.
//
// The kernels of this folder are compiled twice: as level `amx`, and with CHATGLM_AMX_EMULATED as `amx_emulated`, where
// tiles_emulated.h computes what the instructions do. The second serves tests on machines without AMX.
//
// Inline assembly instead of the compiler's intrinsics: those of GCC 12 take tile numbers as text and do not say which
// memory they read, so that stores into a configuration or an operand can be taken for dead and dropped.
#pragma once

#include <cstdint>

#if defined(CHATGLM_AMX_EMULATED)
#define CHATGLM_AMX_LEVEL amx_emulated
#if defined(CHATGLM_AMX_EMPTY)
#include "kernels/amx/tiles_empty.h"
#else
#include "kernels/amx/tiles_emulated.h"
#endif
#else
#define CHATGLM_AMX_LEVEL amx
#endif

namespace chatglm::CHATGLM_AMX_LEVEL {
namespace {

// The operand of LDTILECFG.
struct alignas(64) TileConfiguration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t column_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Sums in tiles 0..3 (rows x 16 of 4 bytes), A in 4 and 5 (rows x depth_bytes), B in 6 and 7 (depth_bytes / 4 lines of
// 64 bytes): the tiles as everything here uses them.
inline TileConfiguration configuration_of(int64_t rows, int64_t depth_bytes) {
    TileConfiguration configuration;
    for (int tile = 0; tile < 8; ++tile) {
        const bool is_a = tile == 4 || tile == 5;
        configuration.column_bytes[tile] = static_cast<uint16_t>(is_a ? depth_bytes : 64);
        configuration.rows[tile] = static_cast<uint8_t>(tile < 6 ? rows : depth_bytes / 4);
    }
    return configuration;
}

#if defined(CHATGLM_AMX_EMULATED)

inline void configure_tiles(const TileConfiguration& configuration) { tiles_emulated::configure(&configuration); }
inline void release_tiles() { tiles_emulated::release(); }

template <int kTile>
inline void zero_tile() { tiles_emulated::zero(kTile); }

template <int kTile>
inline void load_tile(const void* p, int64_t stride) { tiles_emulated::load(kTile, p, stride); }

template <int kTile>
inline void store_tile(void* p, int64_t stride) { tiles_emulated::store(kTile, p, stride); }

template <int kSum, int kA, int kB>
inline void dot_bf16() { tiles_emulated::dot_bf16(kSum, kA, kB); }

template <int kSum, int kA, int kB>
inline void dot_s8_s8() { tiles_emulated::dot_int8<int8_t, int8_t>(kSum, kA, kB); }

template <int kSum, int kA, int kB>
inline void dot_s8_u8() { tiles_emulated::dot_int8<int8_t, uint8_t>(kSum, kA, kB); }

#else

inline void configure_tiles(const TileConfiguration& configuration) {
    asm volatile("ldtilecfg %0" ::"m"(configuration));
}

inline void release_tiles() {
    asm volatile("tilerelease");
}

template <int kTile>
inline void zero_tile() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

// Rows of the tile lie `stride` bytes apart.
template <int kTile>
inline void load_tile(const void* p, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
inline void store_tile(void* p, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(kTile) : "memory");
}

// Sum[m][n] += A[m][k] B[k][n]. A line of B holds 16 columns n, each with 2 (bf16) or 4 (int8) neighbours of k.
template <int kSum, int kA, int kB>
inline void dot_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
}

template <int kSum, int kA, int kB>
inline void dot_s8_s8() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
}

template <int kSum, int kA, int kB>
inline void dot_s8_u8() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
}

#endif

// Tiles from construction to destruction.
class TileScope {
public:
    TileScope(int64_t rows, int64_t depth_bytes) { configure_tiles(configuration_of(rows, depth_bytes)); }
    ~TileScope() { release_tiles(); }
    TileScope(const TileScope&) = delete;
    TileScope& operator=(const TileScope&) = delete;
};

inline void zero_sums() {
    zero_tile<0>();
    zero_tile<1>();
    zero_tile<2>();
    zero_tile<3>();
}

}  // namespace
}  // namespace chatglm::CHATGLM_AMX_LEVEL
