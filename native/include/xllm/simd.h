// Vectors of float32 as the compiler sees them, one width per ISA path, with the few functions kernels need.
// The last, incomplete vector of a row goes through the same arithmetic as the whole ones, so an element's
// value never depends on where it stands. Sources are built with -ffp-contract=off: a product is fused into a
// sum where `fma` says so and nowhere else.
#ifndef XLLM_SIMD_H
#define XLLM_SIMD_H

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace xn {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));

inline vf splat(float x) { return vf{} + x; }
inline vi splat(int32_t x) { return vi{} + x; }
inline vi bits(vf x) { return (vi)x; }
inline vf floats(vi x) { return (vf)x; }

inline vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

// a where the mask's lanes are −1, b where they are 0.
inline vf select(vi mask, vf a, vf b) { return floats((bits(a) & mask) | (bits(b) & ~mask)); }
// b where a is NaN, as the instructions have it.
#if defined(__AVX512F__)
inline vf max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
inline vf min(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__) && defined(__FMA__)
inline vf max(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
inline vf min(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
#else
inline vf max(vf a, vf b) { return select(a > b, a, b); }
inline vf min(vf a, vf b) { return select(a < b, a, b); }
#endif

inline float sum(vf x) {
    float lanes[kLanes];
    std::memcpy(lanes, &x, sizeof lanes);
    for (int half = kLanes / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

inline float highest(vf x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)x);
#else
    float lanes[kLanes];
    std::memcpy(lanes, &x, sizeof lanes);
    float most = lanes[0];
    for (int i = 1; i < kLanes; i++) most = lanes[i] > most ? lanes[i] : most;
    return most;
#endif
}

// How many of a vector's elements are in memory: all, or the first `count`.
struct Whole {};
struct Part {
    int64_t count;
};

inline vf load(const float* from, Whole = {}) {
    vf x;
    std::memcpy(&x, from, sizeof x);
    return x;
}
inline vf load(const float* from, Part part) {
    vf x{};
    std::memcpy(&x, from, part.count * sizeof(float));
    return x;
}
inline void store(float* to, vf x, Whole = {}) { std::memcpy(to, &x, sizeof x); }
inline void store(float* to, vf x, Part part) { std::memcpy(to, &x, part.count * sizeof(float)); }

// f(offset, Whole or Part) for every vector of a row of n elements.
template <class F>
inline void each_vector(int64_t n, F&& f) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) f(i, Whole{});
    if (i < n) f(i, Part{n - i});
}

// eˣ, within 1.5 ulp; saturates at e^±87. Cody and Waite's reduction and a polynomial of degree 6.
inline vf exp(vf x) {
    x = min(max(x, splat(-87.0f)), splat(87.0f));
    const vf magic = splat(12582912.0f);  // 1.5 · 2²³: adding it leaves the rounded integer in the low bits
    vf shifted = fma(x, splat(1.44269504088896341f), magic);
    vf whole = shifted - magic;
    vf r = fma(whole, splat(-0.693359375f), x);
    r = fma(whole, splat(2.12194440e-4f), r);
    vf p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r) + splat(1.0f);
    return floats(bits(p) + ((bits(shifted) - bits(magic)) << 23));
}

// 2ˣ for x ≤ 0; below −126 it is 0 or as good as that.
inline vf exp2_of_negative(vf x) {
#if defined(__AVX512F__)
    vf whole = (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const vf magic = splat(12582912.0f);
    x = max(x, splat(-126.0f));
    vf shifted = x + magic, whole = shifted - magic;
#endif
    vf r = x - whole;
    vf p = splat(1.5403530e-4f);
    p = fma(p, r, splat(1.3333558e-3f));
    p = fma(p, r, splat(9.6181291e-3f));
    p = fma(p, r, splat(5.5504109e-2f));
    p = fma(p, r, splat(2.4022651e-1f));
    p = fma(p, r, splat(6.9314718e-1f));
    p = fma(p, r, splat(1.0f));
#if defined(__AVX512F__)
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)whole);
#else
    return floats(bits(p) + ((bits(shifted) - bits(magic)) << 23));
#endif
}

// The same within 3e-6, for what is rounded to bf16 next: a polynomial of degree 4 over [0, 1).
inline vf weight_of(vf x) {
#if defined(__AVX512F__)
    vf r = (vf)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
    x = max(x, splat(-126.0f));
    vi whole = __builtin_convertvector(x, vi);
    whole += __builtin_convertvector(whole, vf) > x;
    vf r = x - __builtin_convertvector(whole, vf);
#endif
    vf p = splat(1.35341456e-2f);
    p = fma(p, r, splat(5.2011492e-2f));
    p = fma(p, r, splat(2.41442746e-1f));
    p = fma(p, r, splat(6.93003834e-1f));
    p = fma(p, r, splat(1.00000259f));
#if defined(__AVX512F__)
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
    return floats(bits(p) + (whole << 23));
#endif
}

// Odd polynomial near zero, where 1 − 2 / (e²ˣ + 1) would lose digits.
inline vf tanh(vf x) {
    vf size = floats(bits(x) & splat(0x7fffffff));
    vf far = splat(1.0f) - splat(2.0f) / (exp(size + size) + splat(1.0f));
    far = floats(bits(far) | (bits(x) & splat(INT32_MIN)));
    vf square = x * x;
    vf p = splat(-5.70498872745e-3f);
    p = fma(p, square, splat(2.06390887954e-2f));
    p = fma(p, square, splat(-5.37397155531e-2f));
    p = fma(p, square, splat(1.33314422036e-1f));
    p = fma(p, square, splat(-3.33332819422e-1f));
    vf near = fma(p * square, x, x);
    return select(size < splat(0.625f), near, far);
}

// Round to nearest even. NaN does not occur in what is stored.
inline uint16_t to_bf16(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline float from_bf16(uint16_t x) {
    uint32_t u = uint32_t(x) << 16;
    float y;
    std::memcpy(&y, &u, 4);
    return y;
}
// The same, kept as float32.
inline vf round_bf16(vf x) {
    vi u = bits(x);
    vi odd = (u >> 16) & splat(int32_t(1));
    return floats((u + splat(int32_t(0x7fff)) + odd) & splat(int32_t(0xffff0000)));
}

// One vector of values as kLanes bf16, and what they stand for afterwards.
inline vf store_bf16(uint16_t* to, vf x) {
#if defined(__AVX512BF16__)
    __m256i words = (__m256i)_mm512_cvtneps_pbh((__m512)x);
    std::memcpy(to, &words, sizeof words);
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16);
#else
    vf rounded = round_bf16(x);
    uint32_t wide[kLanes];
    std::memcpy(wide, &rounded, sizeof wide);
    for (int i = 0; i < kLanes; i++) to[i] = uint16_t(wide[i] >> 16);
    return rounded;
#endif
}

}  // namespace xn

#endif  // XLLM_SIMD_H
