// 16-bit floats as bits, one at a time; vector forms are in simd-inl.h.
#pragma once

#include <cstdint>
#include <cstring>

namespace chatglm {

inline float float_of_bf16(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

inline float float_of_half(uint16_t bits) {
    _Float16 half;
    std::memcpy(&half, &bits, 2);
    return static_cast<float>(half);
}

}  // namespace chatglm
