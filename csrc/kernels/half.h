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
    const uint32_t exponent = bits >> 10 & 0x1f, fraction = bits & 0x3ff;
    // Subnormal ones by their size: as floats they are not, but their bits in place would be.
    float value = static_cast<float>(fraction) * 0x1p-24f;
    if (exponent != 0) {
        const uint32_t wide = (exponent == 0x1f ? 0xff : exponent + 112) << 23 | fraction << 13;
        std::memcpy(&value, &wide, 4);
    }
    return (bits & 0x8000) != 0 ? -value : value;
}

}  // namespace chatglm
