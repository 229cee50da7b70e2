// The sampler's noise: Philox4x32-10 and a logarithm of correctly rounded operations, as docs/design/0002-sampler.md
// defines them. The same bits on every path, and the same as the numpy sampler's.
// Beside it the vectors that the sampler computes with. What must not live here: which tokens may be drawn.
#ifndef XLLM_NOISE_H
#define XLLM_NOISE_H

#include "xllm/simd.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace xn {

// One 64-bit lane per Philox block or double, as many as fit the path's vector.
constexpr int kWide = kLanes / 2;
typedef uint64_t vu __attribute__((vector_size(kWide * 8)));
typedef double vd __attribute__((vector_size(kWide * 8)));

inline vf higher(vf a, vf b) {  // b where a is NaN
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__) && defined(__FMA__)
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
    return (vf)_mm_max_ps((__m128)a, (__m128)b);
#else
    return select(a > b, a, b);
#endif
}

inline vf lower(vf a, vf b) { return -higher(-a, -b); }

// Bit i: a[i] ≥ b[i].
inline uint32_t at_least(vf a, vf b) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ);
#elif defined(__AVX2__) && defined(__FMA__)
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GE_OQ));
#elif defined(__SSE2__)
    return _mm_movemask_ps(_mm_cmpge_ps((__m128)a, (__m128)b));
#else
    uint32_t mask = 0;
    for (int i = 0; i < kLanes; ++i) mask |= uint32_t(a[i] >= b[i]) << i;
    return mask;
#endif
}

// Coordinates of a draw; together with a token id they are all that its noise depends on.
struct Coordinates {
    uint64_t seed;
    uint32_t offset, choice;
};

// The product of the low halves of each lane; high halves may hold anything.
inline uint64_t multiply_low(uint64_t a, uint32_t b) { return (a & 0xffffffffu) * b; }
inline uint64_t xor3(uint64_t a, uint64_t b, uint64_t c) { return a ^ b ^ c; }
inline uint64_t all(uint64_t x, uint64_t) { return x; }

inline vu all(uint64_t x, vu) { return vu{} + x; }
inline vu multiply_low(vu a, uint32_t b) {
#if defined(__AVX512F__)
    return (vu)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__) && defined(__FMA__)
    return (vu)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__SSE2__)
    return (vu)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
    return (a & all(0xffffffffu, vu{})) * all(b, vu{});
#endif
}
inline vu xor3(vu a, vu b, vu c) {
#if defined(__AVX512F__)
    return (vu)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, 0x96);
#else
    return a ^ b ^ c;
#endif
}

// Blocks of the counters (c[i][0], offset, choice, 0), lane by lane. The words are the low halves of c[i]
// afterwards. High halves are never read, so nobody clears them.
template <class Lanes64, int batches>
__attribute__((always_inline)) inline void philox(Lanes64 (&c)[batches][4], const Coordinates& at) {
    uint32_t k0 = uint32_t(at.seed), k1 = uint32_t(at.seed >> 32);
    const Lanes64 zero{};
    for (int i = 0; i < batches; ++i) c[i][1] = all(at.offset, zero), c[i][2] = all(at.choice, zero), c[i][3] = zero;
    for (int round = 0; round < 10; ++round) {
        const Lanes64 key0 = all(k0, zero), key1 = all(k1, zero);
        for (int i = 0; i < batches; ++i) {
            const Lanes64 p0 = multiply_low(c[i][0], 0xD2511F53u), p1 = multiply_low(c[i][2], 0xCD9E8D57u);
            c[i][0] = xor3(p1 >> 32, c[i][1], key0);
            c[i][2] = xor3(p0 >> 32, c[i][3], key1);
            c[i][1] = p1, c[i][3] = p0;
        }
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
}

inline uint32_t token_word(int64_t id, const Coordinates& at) {
    uint64_t c[1][4] = {{uint64_t(id) >> 2, 0, 0, 0}};
    philox(c, at);
    return uint32_t(c[0][id & 3]);
}

constexpr double kLn2 = 0x1.62e42fefa39efp-1;
constexpr double kLog2E = 0x1.71547652b82fep+0;

// ln of a positive normal double.
inline double exact_ln(double x) {
    uint64_t bits;
    std::memcpy(&bits, &x, 8);
    int64_t e = int64_t(bits >> 52) - 1022;
    bits = (bits & 0x000fffffffffffffu) | 0x3fe0000000000000u;
    double m;
    std::memcpy(&m, &bits, 8);
    if (m < 0x1.6a09e667f3bcdp-1) m += m, e -= 1;
    const double s = (m - 1.0) / (m + 1.0), z = s * s;
    double series = z * (1.0 / 11.0);
    series = (series + 1.0 / 9.0) * z;
    series = (series + 1.0 / 7.0) * z;
    series = (series + 1.0 / 5.0) * z;
    series = (series + 1.0 / 3.0) * z;
    return double(e) * kLn2 + (s + s) * (series + 1.0);
}

// −ln(−ln u), u = (2 · word + 1) / 2³³.
inline double gumbel(uint32_t word) {
    const double u = (double(word) * 2.0 + 1.0) * 0x1p-33;
    return -exact_ln(-exact_ln(u));
}

}  // namespace xn

#endif  // XLLM_NOISE_H
