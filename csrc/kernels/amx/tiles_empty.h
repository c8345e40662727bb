// Tile instructions that compute nothing, under the names of tiles_emulated.h: what is left is all that the kernels do
// beside them. For measuring it, also on machines without AMX (CMake's option CHATGLM_OV_EMPTY_TILES); results are
// nonsense. Only a store writes, ones, as many lines as a tile has rows: what reads sums takes them from there.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace chatglm::tiles_emulated {
namespace {

inline uint8_t* rows_of_tiles() {
    static thread_local uint8_t rows[16];
    return rows;
}

// The operand of LDTILECFG has the rows of the tiles in its last 16 bytes.
inline void configure(const void* configuration) {
    std::memcpy(rows_of_tiles(), static_cast<const uint8_t*>(configuration) + 48, 16);
}

inline void release() {}
inline void zero(int) {}
// As the instructions themselves, loads and stores keep what is in memory from being held in registers.
inline void load(int, const void*, int64_t) { asm volatile("" ::: "memory"); }
inline void dot_bf16(int, int, int) {}

template <typename A, typename B>
inline void dot_int8(int, int, int) {}

inline void store(int tile, void* p, int64_t stride) {
    const int rows = rows_of_tiles()[tile];
    for (int row = 0; row < rows; ++row) _mm512_storeu_ps(static_cast<char*>(p) + row * stride, _mm512_set1_ps(1.0f));
    asm volatile("" ::: "memory");
}

}  // namespace
}  // namespace chatglm::tiles_emulated
