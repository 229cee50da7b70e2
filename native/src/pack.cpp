// Weights into panels and back. Codes and scales of a file are moved, never recomputed: a packed weight
// stands for exactly the values its file does.
#include "xllm/pack.h"

#include <new>

#include "xllm/threads.h"

namespace xn {
namespace {

// A matrix of the class with room for its panels, or NULL.
xn_matrix* make(int32_t weight_class, int64_t num_out, int64_t num_in, int32_t zero, bool half, bool mins) {
    xn_matrix* m = new (std::nothrow) xn_matrix;
    if (m == nullptr) return nullptr;
    memset(m, 0, sizeof(*m));  // padding too: the struct is stored as bytes
    m->weight_class = weight_class;
    m->zero = zero;
    m->half_scales = half;
    m->has_mins = mins;
    m->num_out = num_out;
    m->num_in = num_in;
    if (!lay_out(m)) {
        delete m;
        return nullptr;
    }
    m->panels = static_cast<uint8_t*>(weight_memory(static_cast<size_t>(m->bytes)));
    if (m->panels == nullptr) {
        delete m;
        return nullptr;
    }
    return m;
}

bool good_shape(int64_t num_out, int64_t num_in, int64_t multiple) {
    constexpr int64_t kMost = int64_t{1} << 31;
    return num_out >= 1 && num_in >= 1 && num_out < kMost && num_in < kMost && num_in % multiple == 0;
}

bool all_half(const float* values, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        const float back = half_value(half_bits(values[i]));
        if (memcmp(&back, &values[i], 4) != 0) return false;
    }
    return true;
}

uint32_t load_word(const void* from) {
    uint32_t word;
    memcpy(&word, from, 4);
    return word;
}

// Where four bytes of a channel stand: K step `step` of its panel, two inputs in bf16, four in codes.
int64_t word_at(int64_t step, int64_t channel) { return (step * kPanel + channel) * 4; }

void put_word(uint8_t* panel, int64_t step, int64_t channel, uint32_t word) {
    memcpy(panel + word_at(step, channel), &word, 4);
}

void put_scale(const xn_matrix& m, uint8_t* row, int64_t channel, float value) {
    if (m.half_scales) {
        const uint16_t bits = half_bits(value);
        memcpy(row + 2 * channel, &bits, 2);
    } else {
        memcpy(row + 4 * channel, &value, 4);
    }
}

float get_scale(const xn_matrix& m, const uint8_t* row, int64_t channel) {
    if (m.half_scales) {
        uint16_t bits;
        memcpy(&bits, row + 2 * channel, 2);
        return half_value(bits);
    }
    float value;
    memcpy(&value, row + 4 * channel, 4);
    return value;
}

void put_bf16(const xn_matrix& m, uint8_t* panel, int64_t channel, const float* row) {
    constexpr int64_t kPiece = 256;
    uint16_t bits[kPiece];
    for (int64_t start = 0; start < m.num_in; start += kPiece) {
        const int64_t count = m.num_in - start < kPiece ? m.num_in - start : kPiece;
        for (int64_t k = 0; k < count; ++k) bits[k] = bf16_bits(row[start + k]);
        for (int64_t k = 0; k < count; k += 2) put_word(panel, (start + k) / 2, channel, load_word(bits + k));
    }
}

void put_codes(const xn_matrix& m, uint8_t* panel, int64_t channel, const uint8_t* codes) {
    if (m.weight_class != XN_W4G32) {
        for (int64_t k = 0; k < m.num_in; k += 4)
            put_word(panel, k / 4, channel, load_word(codes + k) ^ 0x80808080u);  // int8 + 128
        return;
    }
    for (int64_t g = 0; g < m.num_groups(); ++g, codes += XN_GROUP)
        for (int64_t q = 0; q < 4; ++q) {
            const uint32_t low = load_word(codes + 4 * q), high = load_word(codes + 16 + 4 * q);
            put_word(panel, 4 * g + q, channel, (low & 0x0f0f0f0fu) | (high & 0x0f0f0f0fu) << 4);
        }
}

// `scales` and `mins` are those of the channel.
void put_scales(const xn_matrix& m, uint8_t* panel, int64_t channel, const float* scales, const float* mins) {
    for (int64_t g = 0; g < m.num_scales(); ++g) {
        put_scale(m, panel + m.scales_at + g * m.scale_row_bytes(), channel, scales[g]);
        if (m.has_mins) put_scale(m, panel + m.mins_at + g * m.scale_row_bytes(), channel, mins[g]);
    }
}

int32_t pack_codes(
    xn_pool* pool, int32_t weight_class, int64_t group, const uint8_t* codes, const float* scales,
    const float* mins, int64_t num_out, int64_t num_in, xn_matrix** made) {
    if (codes == nullptr || scales == nullptr || made == nullptr || !good_shape(num_out, num_in, XN_GROUP))
        return XN_ERR_ARGUMENT;
    const int64_t groups = num_in / group, count = num_out * groups;
    int32_t zero = weight_class == XN_W4G32 ? 0 : 128;
    if (weight_class == XN_W4G32 && mins != nullptr) {
        // Q4_0: an integer offset is exact and needs no min. d·q − 8·d and d·(q − 8) are the same float.
        bool centred = true;
        for (int64_t i = 0; i < count && centred; ++i) centred = mins[i] == -8.0f * scales[i];
        if (centred) {
            zero = 8;
            mins = nullptr;
        }
    }
    const bool half = all_half(scales, count) && (mins == nullptr || all_half(mins, count));
    xn_matrix* m = make(weight_class, num_out, num_in, zero, half, mins != nullptr);
    if (m == nullptr) return XN_ERR_MEMORY;
    parallel(pool, m->num_panels, [&](int64_t p, int32_t) {
        memset(m->panel(p), 0, static_cast<size_t>(m->panel_bytes));
        for (int64_t n = p * kPanel; n < num_out && n < (p + 1) * kPanel; ++n) {
            put_codes(*m, m->panel(p), n % kPanel, codes + n * num_in);
            const float* own_mins = mins == nullptr ? nullptr : mins + n * groups;
            put_scales(*m, m->panel(p), n % kPanel, scales + n * groups, own_mins);
        }
    });
    *made = m;
    return XN_OK;
}

void get_bf16(const xn_matrix& m, const uint8_t* panel, int64_t channel, float* y) {
    for (int64_t k = 0; k < m.num_in; k += 2) {
        const uint32_t pair = load_word(panel + word_at(k / 2, channel));
        y[k] = bf16_value(static_cast<uint16_t>(pair));
        y[k + 1] = bf16_value(static_cast<uint16_t>(pair >> 16));
    }
}

// code · scale + min, two roundings, as the formats define their values.
void get_codes(const xn_matrix& m, const uint8_t* panel, int64_t channel, float* y) {
    const bool four = m.weight_class == XN_W4G32;
    const int64_t group = m.group_size();
    for (int64_t first = 0; first < m.num_in; first += group) {
        const uint8_t* row = panel + first / group * m.scale_row_bytes();
        const float scale = get_scale(m, row + m.scales_at, channel);
        const float min = m.has_mins ? get_scale(m, row + m.mins_at, channel) : 0.0f;
        for (int64_t k = first; k < first + group; ++k) {
            const int64_t quad = k / 4, of_group = quad % 8;
            const uint8_t byte = panel[word_at(four ? quad / 8 * 4 + of_group % 4 : quad, channel) + k % 4];
            const int32_t code = (!four ? byte : of_group < 4 ? byte & 15 : byte >> 4) - m.zero;
            const float value = scale * static_cast<float>(code);
            y[k] = m.has_mins ? value + min : value;
        }
    }
}

void get_channel(const xn_matrix& m, int64_t n, float* y) {
    const uint8_t* panel = m.panel(n / kPanel);
    if (m.weight_class == XN_BF16) get_bf16(m, panel, n % kPanel, y);
    else get_codes(m, panel, n % kPanel, y);
}

}  // namespace

bool lay_out(xn_matrix* m) {
    if (m->weight_class < XN_BF16 || m->weight_class > XN_W8A8) return false;
    const bool bf16 = m->weight_class == XN_BF16;
    if (!good_shape(m->num_out, m->num_in, bf16 ? 2 : XN_GROUP)) return false;
    if (m->weight_class == XN_W8A8 && (m->has_mins || m->num_in > kMaxChannelInputs)) return false;
    m->padded_in = round_up(m->num_in, XN_GROUP);
    m->num_panels = round_up(m->num_out, kPanel) / kPanel;
    const int64_t bits = bf16 ? 16 : m->weight_class == XN_W4G32 ? 4 : 8;
    m->scales_at = m->padded_in * kPanel * bits / 8;
    const int64_t scale_bytes = m->num_scales() * m->scale_row_bytes();
    m->mins_at = m->scales_at + scale_bytes;
    m->panel_bytes = round_up(m->mins_at + (m->has_mins ? scale_bytes : 0), 64);
    if (m->panel_bytes > (int64_t{1} << 62) / m->num_panels) return false;
    m->bytes = m->panel_bytes * m->num_panels;
    return true;
}

}  // namespace xn

extern "C" {

int32_t xn_pack_bf16(
    xn_pool* pool, const float* rows, int64_t num_out, int64_t num_in, xn_matrix** made) {
    if (rows == nullptr || made == nullptr || !xn::good_shape(num_out, num_in, 2)) return XN_ERR_ARGUMENT;
    xn_matrix* m = xn::make(XN_BF16, num_out, num_in, 0, false, false);
    if (m == nullptr) return XN_ERR_MEMORY;
    xn::parallel(pool, m->num_panels, [&](int64_t p, int32_t) {
        uint8_t* panel = m->panel(p);
        memset(panel, 0, static_cast<size_t>(m->panel_bytes));
        for (int64_t n = p * xn::kPanel; n < num_out && n < (p + 1) * xn::kPanel; ++n)
            xn::put_bf16(*m, panel, n % xn::kPanel, rows + n * num_in);
    });
    *made = m;
    return XN_OK;
}

int32_t xn_pack_w8g32(
    xn_pool* pool, const int8_t* codes, const float* scales, const float* mins, int64_t num_out,
    int64_t num_in, xn_matrix** made) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(codes);
    return xn::pack_codes(pool, XN_W8G32, XN_GROUP, bytes, scales, mins, num_out, num_in, made);
}

int32_t xn_pack_w4g32(
    xn_pool* pool, const uint8_t* codes, const float* scales, const float* mins, int64_t num_out,
    int64_t num_in, xn_matrix** made) {
    return xn::pack_codes(pool, XN_W4G32, XN_GROUP, codes, scales, mins, num_out, num_in, made);
}

int32_t xn_pack_w8g16(
    xn_pool* pool, const int8_t* codes, const float* scales, const float* mins, int64_t num_out,
    int64_t num_in, xn_matrix** made) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(codes);
    return xn::pack_codes(pool, XN_W8G16, 16, bytes, scales, mins, num_out, num_in, made);
}

int32_t xn_pack_w8a8(
    xn_pool* pool, const int8_t* codes, const float* scales, int64_t num_out, int64_t num_in,
    xn_matrix** made) {
    if (num_in < 1 || num_in > xn::kMaxChannelInputs) return XN_ERR_ARGUMENT;
    const auto* bytes = reinterpret_cast<const uint8_t*>(codes);
    return xn::pack_codes(pool, XN_W8A8, num_in, bytes, scales, nullptr, num_out, num_in, made);
}

void xn_matrix_free(xn_matrix* matrix) {
    if (matrix == nullptr) return;
    if (!matrix->borrowed) xn::free_weight_memory(matrix->panels);
    delete matrix;
}

int32_t xn_matrix_class(const xn_matrix* matrix) { return matrix->weight_class; }
int64_t xn_matrix_num_out(const xn_matrix* matrix) { return matrix->num_out; }
int64_t xn_matrix_num_in(const xn_matrix* matrix) { return matrix->num_in; }
int64_t xn_matrix_bytes(const xn_matrix* matrix) { return matrix->bytes; }

int32_t xn_matrix_rows(
    const xn_matrix* matrix, const int64_t* ids, int64_t num_ids, float* y, int64_t ldy) {
    if (matrix == nullptr || ids == nullptr || y == nullptr || ldy < matrix->num_in) return XN_ERR_ARGUMENT;
    for (int64_t i = 0; i < num_ids; ++i)
        if (ids[i] < 0 || ids[i] >= matrix->num_out) return XN_ERR_ARGUMENT;
    for (int64_t i = 0; i < num_ids; ++i) xn::get_channel(*matrix, ids[i], y + i * ldy);
    return XN_OK;
}

}  // extern "C"
