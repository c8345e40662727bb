// Packed weights: the one layout that conversion writes and every kernel reads.
//
// A weight W [out_features, in_features] is cut into panels of 16 output features. Letters: P panels, K' in_features
// rounded up (padding is weight 0), G' groups of K'.
//
//   f32    [P][K'    ][16]     float32                                        K' multiple of 16
//   bf16   [P][K' / 2][16][2]  bfloat16: two neighbours of K side by side     K' multiple of 32
//   int8   [P][K' / 4][16][4]  uint8 = weight + 128                           K' multiple of 64
//          then scale [P][16] float32
//   int4   [P][K' / 8][16][4]  bytes: the low nibble is k = 8 i + j, the high nibble k = 8 i + 4 + j
//          then scale [P][G'][16] float16, then zero_point [P][G'][16] uint8  K' multiple of 64 and of the group
//
// A line of 64 bytes is 16 output features: what one AVX-512 VNNI or BF16 instruction takes, and one row of an AMX
// B tile. Sections start at multiples of 64 bytes. Value of a weight: scale * (code - zero_point), with zero_point
// 128 in int8.
#pragma once

#include <cstdint>
#include <string>

namespace chatglm {

// Raised with every change of a layout in this file or in cache_layout.h, and of what an operation takes; an IR of
// another version is refused. chatglm_ov/weights/unpacking.py reads this version too, without the library.
constexpr int64_t kPackingVersion = 2;

constexpr int64_t kPanel = 16;

enum class WeightFormat { f32, bf16, int8, int4 };

// Throws std::invalid_argument that lists the names.
WeightFormat parse_format(const std::string& name);

constexpr int64_t round_up(int64_t value, int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

struct PackedLayout {
    WeightFormat format;
    int64_t out_features;
    int64_t in_features;
    int64_t group_size;  // int4: 32, 64 or 128, a divisor of in_features; other formats: 0

    // Throws std::invalid_argument for sizes that cannot be packed.
    void check() const;

    int64_t panels() const { return round_up(out_features, kPanel) / kPanel; }
    int64_t padded_in() const {
        switch (format) {
            case WeightFormat::f32: return round_up(in_features, 16);
            case WeightFormat::bf16: return round_up(in_features, 32);
            case WeightFormat::int8: return round_up(in_features, 64);
            default: return round_up(in_features, group_size > 64 ? group_size : 64);
        }
    }
    int64_t groups() const { return padded_in() / group_size; }
    // Codes of one panel.
    int64_t panel_bytes() const {
        switch (format) {
            case WeightFormat::f32: return padded_in() * kPanel * 4;
            case WeightFormat::bf16: return padded_in() * kPanel * 2;
            case WeightFormat::int8: return padded_in() * kPanel;
            default: return padded_in() * kPanel / 2;
        }
    }
    int64_t scale_offset() const { return panels() * panel_bytes(); }
    int64_t zero_point_offset() const;
    int64_t bytes() const;

    const uint8_t* panel(const uint8_t* payload, int64_t p) const { return payload + p * panel_bytes(); }
    const float* channel_scales(const uint8_t* payload) const {
        return reinterpret_cast<const float*>(payload + scale_offset());
    }
    const uint16_t* group_scales(const uint8_t* payload, int64_t p) const {
        return reinterpret_cast<const uint16_t*>(payload + scale_offset()) + p * groups() * kPanel;
    }
    const uint8_t* zero_points(const uint8_t* payload, int64_t p) const {
        return payload + zero_point_offset() + p * groups() * kPanel;
    }
};

// Packs the codes of `rows` consecutive output features (a multiple of 16, or the last ones) into out
// [ceil(rows / 16)][panel_bytes]. `codes` is row-major [rows, in_features]: float, bfloat16 bits, int8 in -127..127,
// or one 4-bit code a byte.
void pack_codes(const PackedLayout& layout, const void* codes, int64_t rows, uint8_t* out);

// Reads output feature `row` of a packed weight back as float [in_features].
void unpack_row(const PackedLayout& layout, const uint8_t* payload, int64_t row, float* out);

}  // namespace chatglm
