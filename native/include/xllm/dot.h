// Products of 8-bit codes, for the classes whose panels are [K/4][16][4]: `multiply_codes` where there is VNNI,
// `add_products` where there is not. Integer sums are exact, so both give the same.
#ifndef XLLM_DOT_H
#define XLLM_DOT_H

#include "xllm/tile.h"

namespace xn {

#if defined(__AVX512VNNI__)

template <int NR>
XN_INLINE void multiply_codes(__m512i x, const __m512i* w, __m512i* acc) {
    for_each<NR>([&](auto n) XN_LAMBDA {
        asm volatile("vpdpbusd %[x], %[w], %[a]" : [a] "+v"(acc[n]) : [x] "v"(x), [w] "v"(w[n]));
    });
}

#else

// Two partial sums per channel of a panel.
struct PairSums {
    alignas(32) int32_t of[32];

    XN_INLINE void clear() { memset(of, 0, sizeof of); }

    XN_INLINE Integers total(int32_t start) const {
        int32_t sums[16];
        for (int n = 0; n < 16; ++n) sums[n] = start + of[2 * n] + of[2 * n + 1];
        Integers out;
        memcpy(&out, sums, 64);
        return out;
    }
};

// One K step: four inputs of 16 channels as signed words.
struct Step {
    alignas(32) int16_t words[64];

    XN_INLINE void load(const uint8_t* w) {
        for (int i = 0; i < 64; ++i) words[i] = w[i];
    }
};

XN_INLINE void add_products(const Step& step, const uint8_t* x, PairSums& sums) {
    int16_t inputs[4];
    for (int i = 0; i < 4; ++i) inputs[i] = static_cast<int8_t>(x[i]);
#if defined(__AVX2__)
    int64_t all;
    memcpy(&all, inputs, 8);
    const __m256i four = _mm256_set1_epi64x(all);
    for (int q = 0; q < 4; ++q) {
        // Not `auto*`: deduction drops the attribute that lets a vector alias other types.
        __m256i* into = reinterpret_cast<__m256i*>(sums.of + 8 * q);
        const __m256i words = _mm256_load_si256(reinterpret_cast<const __m256i*>(step.words + 16 * q));
        _mm256_store_si256(into, _mm256_add_epi32(_mm256_load_si256(into), _mm256_madd_epi16(words, four)));
    }
#else
    for (int n = 0; n < 16; ++n)
        for (int half = 0; half < 2; ++half) {
            const int16_t* w = step.words + 4 * n + 2 * half;
            sums.of[2 * n + half] += w[0] * inputs[2 * half] + w[1] * inputs[2 * half + 1];
        }
#endif
}

#endif

// 16 scales, float16 or float32.
#if defined(__AVX512F__)
XN_INLINE __m512 scales_at(const uint8_t* at, bool half) {
    return half ? _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)))
                : _mm512_loadu_ps(reinterpret_cast<const float*>(at));
}
#else
inline Lanes scales_at(const uint8_t* at, bool half) {
    Lanes out;
    if (!half) {
        memcpy(&out, at, 64);
        return out;
    }
    for (int i = 0; i < 16; ++i) {
        uint16_t bits;
        memcpy(&bits, at + 2 * i, 2);
        out[i] = half_value(bits);
    }
    return out;
}
#endif

}  // namespace xn

#endif  // XLLM_DOT_H
