#include "kernels/packing.h"

#include <cstring>
#include <stdexcept>

#include "kernels/half.h"

namespace chatglm {
namespace {

constexpr int64_t kSectionAlignment = 64;

// Writes rows [0, rows) of one panel, kInterleave columns of a row side by side; of each code the bits in `flip`
// change.
template <typename T, int kInterleave>
void pack_panel(const T* codes, int64_t rows, int64_t in_features, int64_t padded_in, T padding, T flip, T* out) {
    for (int64_t k = 0; k < padded_in; ++k) {
        T* line = out + k / kInterleave * kPanel * kInterleave + k % kInterleave;
        for (int64_t channel = 0; channel < kPanel; ++channel) {
            const bool stored = k < in_features && channel < rows;
            line[channel * kInterleave] =
                stored ? static_cast<T>(codes[channel * in_features + k] ^ flip) : padding;
        }
    }
}

void pack_panel_int4(const uint8_t* codes, int64_t rows, int64_t in_features, int64_t padded_in, uint8_t* out) {
    for (int64_t k = 0; k < padded_in; ++k) {
        uint8_t* line = out + k / 8 * kPanel * 4 + k % 4;
        const int shift = k % 8 < 4 ? 0 : 4;
        for (int64_t channel = 0; channel < kPanel; ++channel) {
            const uint8_t code = k < in_features && channel < rows ? codes[channel * in_features + k] : 0;
            uint8_t& byte = line[channel * 4];
            byte = static_cast<uint8_t>(shift == 0 ? code : byte | code << 4);
        }
    }
}

}  // namespace

WeightFormat parse_format(const std::string& name) {
    if (name == "f32") return WeightFormat::f32;
    if (name == "bf16") return WeightFormat::bf16;
    if (name == "int8") return WeightFormat::int8;
    if (name == "int4") return WeightFormat::int4;
    throw std::invalid_argument("format: '" + name + "', wanted one of f32, bf16, int8, int4");
}

void PackedLayout::check() const {
    // So that no number of bytes overflows.
    constexpr int64_t kMost = int64_t{1} << 28;
    if (out_features <= 0 || in_features <= 0 || out_features > kMost || in_features > kMost) {
        throw std::invalid_argument("weight: [" + std::to_string(out_features) + ", " + std::to_string(in_features) +
                                    "], wanted sizes of 1 to " + std::to_string(kMost));
    }
    const bool is_group = group_size == 32 || group_size == 64 || group_size == 128;
    if (format == WeightFormat::int4 && (!is_group || in_features % group_size != 0)) {
        throw std::invalid_argument("group_size: " + std::to_string(group_size) +
                                    ", wanted 32, 64 or 128, a divisor of in_features " + std::to_string(in_features));
    }
}

int64_t PackedLayout::zero_point_offset() const {
    return round_up(scale_offset() + panels() * groups() * kPanel * 2, kSectionAlignment);
}

int64_t PackedLayout::bytes() const {
    switch (format) {
        case WeightFormat::int8: return scale_offset() + panels() * kPanel * 4;
        case WeightFormat::int4: return zero_point_offset() + panels() * groups() * kPanel;
        default: return scale_offset();
    }
}

void pack_codes(const PackedLayout& layout, const void* codes, int64_t rows, uint8_t* out) {
    const int64_t k = layout.in_features, padded = layout.padded_in();
    for (int64_t row = 0; row < rows; row += kPanel, out += layout.panel_bytes()) {
        const int64_t n = rows - row < kPanel ? rows - row : kPanel;
        switch (layout.format) {
            case WeightFormat::f32:
                pack_panel<uint32_t, 1>(static_cast<const uint32_t*>(codes) + row * k, n, k, padded, 0u, 0u,
                                        reinterpret_cast<uint32_t*>(out));
                break;
            case WeightFormat::bf16:
                pack_panel<uint16_t, 2>(static_cast<const uint16_t*>(codes) + row * k, n, k, padded, 0, 0,
                                        reinterpret_cast<uint16_t*>(out));
                break;
            case WeightFormat::int8:
                // weight + 128 as unsigned is the same bits with the top one flipped.
                pack_panel<uint8_t, 4>(static_cast<const uint8_t*>(codes) + row * k, n, k, padded, 0x80, 0x80, out);
                break;
            default:
                pack_panel_int4(static_cast<const uint8_t*>(codes) + row * k, n, k, padded, out);
        }
    }
}

void unpack_row(const PackedLayout& layout, const uint8_t* payload, int64_t row, float* out) {
    const int64_t p = row / kPanel, channel = row % kPanel;
    const uint8_t* panel = layout.panel(payload, p);
    for (int64_t k = 0; k < layout.in_features; ++k) {
        switch (layout.format) {
            case WeightFormat::f32:
                std::memcpy(out + k, panel + (k * kPanel + channel) * 4, 4);
                break;
            case WeightFormat::bf16: {
                uint16_t bits;
                std::memcpy(&bits, panel + ((k / 2 * kPanel + channel) * 2 + k % 2) * 2, 2);
                out[k] = float_of_bf16(bits);
                break;
            }
            case WeightFormat::int8:
                out[k] = layout.channel_scales(payload)[row] *
                         static_cast<float>(panel[(k / 4 * kPanel + channel) * 4 + k % 4] - 128);
                break;
            default: {
                const int byte = panel[(k / 8 * kPanel + channel) * 4 + k % 4];
                const int code = k % 8 < 4 ? byte & 15 : byte >> 4;
                const int64_t at = k / layout.group_size * kPanel + channel;
                out[k] = float_of_half(layout.group_scales(payload, p)[at]) *
                         static_cast<float>(code - layout.zero_points(payload, p)[at]);
            }
        }
    }
}

}  // namespace chatglm
