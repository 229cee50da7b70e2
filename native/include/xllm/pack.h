// What a packed weight looks like in memory, shared by the packers, the GEMM tiles and the row reader.
//
// Output channels stand in panels of 16, each over the full K, so one vector holds one K step of a panel:
//   bf16    [K/2][16][2] bf16
//   w8g32   [K/4][16][4] codes + 128 as bytes, then scales [K/32][16], then mins [K/32][16] if any
//   w4g32   [K/32][4][16][4] bytes: the low nibbles are the group's 1st … 4th four inputs, the high its
//           5th … 8th; then scales and mins as above
//   w8g16   as w8g32 with scales and mins [K/16][16]
//   w8a8    as w8g32 with one row of scales [16] and no mins
// K is padded to a multiple of 32 and channels to whole panels, with zeros.
#ifndef XLLM_PACK_H
#define XLLM_PACK_H

#include <stddef.h>
#include <string.h>

#include "xllm_native.h"

namespace xn {

constexpr int64_t kPanel = 16;
constexpr int64_t kMaxChannelInputs = 1 << 16;  // of w8a8: 255 · 127 · K must stay an int32

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Weights live in large blocks of huge pages; freed blocks go back when their last weight does.
void* weight_memory(size_t bytes);
void free_weight_memory(void* memory);

inline float bf16_value(uint16_t bits) {
    const uint32_t wide = uint32_t{bits} << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

// Round to nearest, ties to even; a NaN stays one.
inline uint16_t bf16_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

float half_value(uint16_t bits);
uint16_t half_bits(float value);  // to nearest, ties to even

}  // namespace xn

struct xn_matrix {
    int32_t weight_class;
    int32_t zero;      // subtracted from a stored code: 8-bit 128; W4 0, or 8 where min = −8 · scale
    bool half_scales;  // scales and mins are float16, which all GGUF formats of one scale per group have
    bool has_mins;
    bool borrowed;  // the panels are the caller's, in a mapped file as a rule
    int64_t num_out, num_in;
    int64_t padded_in, num_panels;
    int64_t panel_bytes, scales_at, mins_at;  // the latter two within a panel
    int64_t bytes;
    uint8_t* panels;

    int64_t num_groups() const { return padded_in / XN_GROUP; }
    // Inputs that share a scale, and rows of scales in a panel.
    int64_t group_size() const {
        return weight_class == XN_W8A8 ? padded_in : weight_class == XN_W8G16 ? 16 : XN_GROUP;
    }
    int64_t num_scales() const { return weight_class == XN_BF16 ? 0 : padded_in / group_size(); }
    int64_t scale_row_bytes() const { return xn::kPanel * (half_scales ? 2 : 4); }
    const uint8_t* panel(int64_t p) const { return panels + p * panel_bytes; }
    uint8_t* panel(int64_t p) { return panels + p * panel_bytes; }
};

namespace xn {

// Fills in all that follows from class, flags and shape, and touches nothing else; false when no packer makes
// such a matrix. Stored records are checked by it, so every derived field must be set here.
bool lay_out(xn_matrix* matrix);

}  // namespace xn

#endif  // XLLM_PACK_H
