// Values ↔ 8-bit and half-precision codes: activations per row and group, and float32 weights at load.
// Groups never span rows, so a row's codes do not depend on its company.
#include <math.h>

#include <algorithm>
#include <memory>
#include <new>

#include "xllm/tile.h"
#include "xllm/threads.h"

namespace xn {

float half_value(uint16_t bits) {
    const uint32_t sign = uint32_t{bits & 0x8000u} << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
    uint32_t wide;
    float value;
    if (exponent == 0) {
        value = static_cast<float>(fraction) * 0x1p-24f;
        memcpy(&wide, &value, 4);
    } else {
        wide = (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13;
    }
    wide |= sign;
    memcpy(&value, &wide, 4);
    return value;
}

uint16_t half_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return sign | 0x7e00;
    if (bits >= 0x477ff000u) return sign | 0x7c00;  // rounds beyond the largest half
    if (bits < 0x38800000u) {  // subnormal: the addition rounds at the half's last place
        memcpy(&value, &bits, 4);
        value += 0.5f;
        memcpy(&bits, &value, 4);
        return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
    }
    bits += 0xfffu + (bits >> 13 & 1);
    return static_cast<uint16_t>(sign | ((bits - 0x38000000u) >> 13));
}

// Codes = x · 127/max|x| to nearest even, scale = max|x|/127. A NaN or infinity anywhere in a group makes
// its scale one too, so that it reaches the output instead of vanishing in the codes.
void to_group_row(const float* x, int64_t num_in, int64_t padded_in, uint8_t* row) {
    auto* info = reinterpret_cast<GroupInfo*>(row + padded_in * kGroupCodeBytes);
    for (int64_t g = 0; g < padded_in / XN_GROUP; ++g) {
        const float* from = x + g * XN_GROUP;
        const int64_t count = std::min<int64_t>(XN_GROUP, num_in - g * XN_GROUP);
        uint8_t* codes = row + g * XN_GROUP * kGroupCodeBytes;
        int32_t sum;
        float scale;
#if defined(__AVX512F__)
        const __m512 low = load_part(from, count, 0), high = load_part(from, count, 1);
        const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
        // As integers, so that NaN is the largest of all.
        const int32_t top = _mm512_reduce_max_epi32(
            _mm512_max_epi32(_mm512_and_si512(_mm512_castps_si512(low), magnitude),
                             _mm512_and_si512(_mm512_castps_si512(high), magnitude)));
        float largest;
        memcpy(&largest, &top, 4);
        scale = largest / 127.0f;
        const float factor = largest > 0.0f ? 127.0f / largest : 0.0f;
        const __m512 wide = _mm512_set1_ps(factor);
        const __m512i limit = _mm512_set1_epi32(127);
        // A NaN or infinity has no code: the codes are 0, and the scale carries it into this row alone.
        const __mmask16 finite = top < 0x7f800000 ? 0xffff : 0;
        const __m512i a = _mm512_maskz_min_epi32(finite, _mm512_cvtps_epi32(_mm512_mul_ps(low, wide)), limit);
        const __m512i b = _mm512_maskz_min_epi32(finite, _mm512_cvtps_epi32(_mm512_mul_ps(high, wide)), limit);
        sum = _mm512_reduce_add_epi32(_mm512_add_epi32(a, b));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm512_cvtsepi32_epi8(a));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + 16), _mm512_cvtsepi32_epi8(b));
#else
        uint32_t top = 0;
        for (int64_t i = 0; i < count; ++i) {
            uint32_t bits;
            memcpy(&bits, from + i, 4);
            top = std::max(top, bits & 0x7fffffffu);
        }
        float largest;
        memcpy(&largest, &top, 4);
        scale = largest / 127.0f;
        const float factor = largest > 0.0f && top < 0x7f800000u ? 127.0f / largest : 0.0f;
        sum = 0;
        for (int64_t i = 0; i < XN_GROUP; ++i) {
            const float scaled = i < count && factor > 0.0f ? from[i] * factor : 0.0f;
            const int32_t code = std::clamp(static_cast<int32_t>(nearbyintf(scaled)), -128, 127);
            const auto word = static_cast<int16_t>(code);
            memcpy(codes + i * kGroupCodeBytes, &word, kGroupCodeBytes);
            sum += code;
        }
#endif
        info[g] = GroupInfo{scale, scale * static_cast<float>(sum), -128 * sum, -8 * sum};
    }
}

namespace {

// Scales are rounded to float16 before they are used, as the files' formats do, unless that loses them.
float storable(float scale) {
    const float half = half_value(half_bits(scale));
    return isfinite(half) && (half != 0.0f || scale == 0.0f) ? half : scale;
}

void quantize_w8(const float* from, int8_t* codes, float* scale, float*) {
    float largest = 0.0f;
    for (int i = 0; i < XN_GROUP; ++i) largest = std::max(largest, fabsf(from[i]));
    *scale = storable(largest / 127.0f);
    for (int i = 0; i < XN_GROUP; ++i) {
        const float code = *scale > 0.0f ? nearbyintf(from[i] / *scale) : 0.0f;
        codes[i] = static_cast<int8_t>(std::clamp(code, -127.0f, 127.0f));
    }
}

void quantize_w4(const float* from, uint8_t* codes, float* scale, float* min) {
    const auto [low, high] = std::minmax_element(from, from + XN_GROUP);
    *min = storable(*low);
    *scale = storable((*high - *low) / 15.0f);
    for (int i = 0; i < XN_GROUP; ++i) {
        const float code = *scale > 0.0f ? nearbyintf((from[i] - *min) / *scale) : 0.0f;
        codes[i] = static_cast<uint8_t>(std::clamp(code, 0.0f, 15.0f));
    }
}

template <class Code, class Quantize, class Pack>
int32_t quantize(
    xn_pool* pool, const float* rows, int64_t num_out, int64_t num_in, bool with_mins, Quantize one,
    Pack pack) {
    if (rows == nullptr || num_out < 1 || num_in < XN_GROUP || num_in % XN_GROUP != 0) return XN_ERR_ARGUMENT;
    const int64_t groups = num_in / XN_GROUP;
    std::unique_ptr<Code[]> codes(new (std::nothrow) Code[num_out * num_in]);
    std::unique_ptr<float[]> scales(new (std::nothrow) float[num_out * groups]);
    std::unique_ptr<float[]> mins(new (std::nothrow) float[num_out * groups]);
    if (codes == nullptr || scales == nullptr || mins == nullptr) return XN_ERR_MEMORY;
    parallel(pool, num_out, [&](int64_t n, int32_t) {
        for (int64_t g = n * groups; g < (n + 1) * groups; ++g)
            one(rows + g * XN_GROUP, codes.get() + g * XN_GROUP, scales.get() + g, mins.get() + g);
    });
    return pack(codes.get(), scales.get(), with_mins ? mins.get() : nullptr);
}

}  // namespace
}  // namespace xn

extern "C" {

int32_t xn_quantize_w8g32(
    xn_pool* pool, const float* rows, int64_t num_out, int64_t num_in, xn_matrix** made) {
    return xn::quantize<int8_t>(
        pool, rows, num_out, num_in, false, xn::quantize_w8,
        [&](const int8_t* codes, const float* scales, const float* mins) {
            return xn_pack_w8g32(pool, codes, scales, mins, num_out, num_in, made);
        });
}

int32_t xn_quantize_w4g32(
    xn_pool* pool, const float* rows, int64_t num_out, int64_t num_in, xn_matrix** made) {
    return xn::quantize<uint8_t>(
        pool, rows, num_out, num_in, true, xn::quantize_w4,
        [&](const uint8_t* codes, const float* scales, const float* mins) {
            return xn_pack_w4g32(pool, codes, scales, mins, num_out, num_in, made);
        });
}

}  // extern "C"
