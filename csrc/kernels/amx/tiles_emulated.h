// What AMX's tile instructions compute, palette 1, in plain C++: for tests on machines without AMX.
//
// What raises an exception of the processor raises std::logic_error here, with the reason.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

namespace chatglm::tiles_emulated {
namespace {

constexpr int kTiles = 8;
constexpr int kMaxTileRows = 16;
constexpr int kMaxColumnBytes = 64;

struct Tile {
    int rows = 0, column_bytes = 0;
    alignas(64) uint8_t bytes[kMaxTileRows][kMaxColumnBytes] = {};

    template <typename T>
    T* row(int i) { return reinterpret_cast<T*>(bytes[i]); }
};

struct TileState {
    bool configured = false;
    Tile tiles[kTiles];
};

inline TileState& state() {
    static thread_local TileState state;
    return state;
}

inline void require(bool holds, const std::string& message) {
    if (!holds) throw std::logic_error("AMX: " + message);
}

// The 64 bytes of LDTILECFG: palette, start row, 14 reserved, 16 x column bytes (16 bits), 16 x rows.
inline void configure(const void* configuration) {
    uint8_t bytes[64];
    std::memcpy(bytes, configuration, 64);
    state() = TileState();
    require(bytes[0] == 1, "palette " + std::to_string(bytes[0]) + ", wanted 1");
    require(bytes[1] == 0, "start row " + std::to_string(bytes[1]) + ", wanted 0");
    for (int i = 2; i < 16; ++i) require(bytes[i] == 0, "reserved byte " + std::to_string(i) + " is not 0");
    for (int i = 0; i < 16; ++i) {
        uint16_t column_bytes;
        std::memcpy(&column_bytes, bytes + 16 + 2 * i, 2);
        const int rows = bytes[48 + i];
        const std::string shape = "tile " + std::to_string(i) + " of " + std::to_string(rows) + " rows, " +
                                  std::to_string(column_bytes) + " bytes";
        require(rows <= kMaxTileRows && column_bytes <= kMaxColumnBytes, shape + ", wanted at most 16 and 64");
        require((rows == 0) == (column_bytes == 0), shape + ", wanted both or none to be 0");
        require(i < kTiles || rows == 0, shape + ", wanted 8 tiles");
        if (i < kTiles) {
            state().tiles[i].rows = rows;
            state().tiles[i].column_bytes = column_bytes;
        }
    }
    state().configured = true;
}

inline void release() {
    state() = TileState();
}

inline Tile& tile(int number) {
    require(state().configured, "tiles are not configured");
    Tile& tile = state().tiles[number];
    require(tile.rows > 0, "tile " + std::to_string(number) + " is not configured");
    return tile;
}

inline void zero(int number) {
    Tile& t = tile(number);
    std::memset(t.bytes, 0, sizeof t.bytes);
}

inline void load(int number, const void* p, int64_t stride) {
    Tile& t = tile(number);
    std::memset(t.bytes, 0, sizeof t.bytes);
    for (int i = 0; i < t.rows; ++i) {
        std::memcpy(t.bytes[i], static_cast<const uint8_t*>(p) + i * stride, static_cast<size_t>(t.column_bytes));
    }
}

inline void store(int number, void* p, int64_t stride) {
    Tile& t = tile(number);
    for (int i = 0; i < t.rows; ++i) {
        std::memcpy(static_cast<uint8_t*>(p) + i * stride, t.bytes[i], static_cast<size_t>(t.column_bytes));
    }
}

// Operands of Sum[m][n] += A[m][k] B[k][n], which must be three tiles of matching shapes.
struct Operands {
    Tile &sum, &a, &b;

    Operands(int sum_number, int a_number, int b_number)
        : sum(tile(sum_number)), a(tile(a_number)), b(tile(b_number)) {
        require(sum_number != a_number && sum_number != b_number && a_number != b_number, "operands are not distinct");
        require(sum.column_bytes % 4 == 0 && a.column_bytes % 4 == 0, "columns are not whole");
        require(sum.rows == a.rows && sum.column_bytes == b.column_bytes && a.column_bytes == 4 * b.rows,
                "shapes of a product do not match");
    }

    int rows() const { return sum.rows; }
    int columns() const { return sum.column_bytes / 4; }
    int depth() const { return b.rows; }
};

template <typename A, typename B>
void dot_int8(int sum_number, int a_number, int b_number) {
    const Operands t(sum_number, a_number, b_number);
    for (int m = 0; m < t.rows(); ++m) {
        int32_t* sum = t.sum.row<int32_t>(m);
        for (int k = 0; k < t.depth(); ++k) {
            const A* a = t.a.row<A>(m) + 4 * k;
            const B* b = t.b.row<B>(k);
            for (int n = 0; n < t.columns(); ++n) {
                for (int j = 0; j < 4; ++j) sum[n] += int32_t{a[j]} * int32_t{b[4 * n + j]};
            }
        }
    }
}

// Subnormal numbers are taken, and returned, as zero with their sign.
inline float flushed(float x) {
    return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x;
}

inline float wide(uint16_t bf16) {
    const uint32_t bits = uint32_t{bf16} << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return flushed(value);
}

// Even and odd k are summed apart, each with fused multiply-adds from zero, then added to each other and to the sum.
inline void dot_bf16(int sum_number, int a_number, int b_number) {
    const Operands t(sum_number, a_number, b_number);
    for (int m = 0; m < t.rows(); ++m) {
        float parts[kMaxColumnBytes / 4][2] = {};
        for (int k = 0; k < t.depth(); ++k) {
            const uint16_t* a = t.a.row<uint16_t>(m) + 2 * k;
            const uint16_t* b = t.b.row<uint16_t>(k);
            for (int n = 0; n < t.columns(); ++n) {
                for (int j = 0; j < 2; ++j) {
                    parts[n][j] = flushed(std::fma(wide(a[j]), wide(b[2 * n + j]), parts[n][j]));
                }
            }
        }
        float* sum = t.sum.row<float>(m);
        for (int n = 0; n < t.columns(); ++n) {
            sum[n] = flushed(flushed(sum[n]) + flushed(parts[n][0] + parts[n][1]));
        }
    }
}

}  // namespace
}  // namespace chatglm::tiles_emulated
