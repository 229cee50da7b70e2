// Activations → 8-bit codes: one scale for a run of inputs, code = round(x · 127 / largest).
//
// What must not live here: how long a run is and where its codes go, which is the weight class's business.
#ifndef XLLM_ROUNDING_H
#define XLLM_ROUNDING_H

#include <math.h>

#include <algorithm>

#include "xllm/tile.h"

namespace xn {

// `factor` is 0 for a run of zeros, and for one with a NaN or infinity, which has no codes: they are 0, and
// the scale carries it into the outputs of this row alone.
struct Rounding {
    float scale, factor;
};

// As integers, so that NaN is the largest of all.
XN_INLINE Rounding rounding_of(const float* x, int64_t count) {
    uint32_t top = 0;
#if defined(__AVX512F__)
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i most = _mm512_setzero_si512();
    for (int64_t k = 0; k < count; k += 16) {
        const __m512i bits = _mm512_castps_si512(load_part(x + k, count - k, 0));
        most = _mm512_max_epi32(most, _mm512_and_si512(bits, magnitude));
    }
    top = static_cast<uint32_t>(_mm512_reduce_max_epi32(most));
#else
    for (int64_t k = 0; k < count; ++k) {
        uint32_t bits;
        memcpy(&bits, x + k, 4);
        top = std::max(top, bits & 0x7fffffffu);
    }
#endif
    float largest;
    memcpy(&largest, &top, 4);
    return {largest / 127.0f, largest > 0.0f && top < 0x7f800000u ? 127.0f / largest : 0.0f};
}

// 16 codes, of which `count` stand for inputs and the rest are 0; their sum.
XN_INLINE int32_t to_codes(const float* x, int64_t count, const Rounding& rounding, uint8_t* codes) {
#if defined(__AVX512F__)
    const __mmask16 any = rounding.factor > 0.0f ? 0xffff : 0;
    const __m512 scaled = _mm512_mul_ps(load_part(x, count, 0), _mm512_set1_ps(rounding.factor));
    const __m512i whole = _mm512_maskz_min_epi32(any, _mm512_cvtps_epi32(scaled), _mm512_set1_epi32(127));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm512_cvtsepi32_epi8(whole));
    return _mm512_reduce_add_epi32(whole);
#else
    int32_t sum = 0;
    for (int64_t k = 0; k < 16; ++k) {
        const float scaled = k < count && rounding.factor > 0.0f ? x[k] * rounding.factor : 0.0f;
        const int32_t code = std::clamp(static_cast<int32_t>(nearbyintf(scaled)), -128, 127);
        codes[k] = static_cast<uint8_t>(code);
        sum += code;
    }
    return sum;
#endif
}

}  // namespace xn

#endif  // XLLM_ROUNDING_H
