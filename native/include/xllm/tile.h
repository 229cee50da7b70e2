// Pieces the tile files share: compile-time loops, partial loads and stores, portable 16-wide lanes.
#ifndef XLLM_TILE_H
#define XLLM_TILE_H

#include <type_traits>
#include <utility>

#include "xllm/gemm.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define XN_INLINE __attribute__((always_inline)) inline
#define XN_LAMBDA __attribute__((always_inline))

namespace xn {

template <int... I>
using Ints = std::integer_sequence<int, I...>;
template <int N>
using Count = std::make_integer_sequence<int, N>;

template <class Body, int... I>
XN_INLINE void for_each_of(Body&& body, Ints<I...>) {
    (body(std::integral_constant<int, I>{}), ...);
}

// body(0) … body(N − 1) with constant arguments: arrays indexed by them stay in registers.
template <int N, class Body>
XN_INLINE void for_each(Body&& body) {
    for_each_of(body, Count<N>{});
}

#if defined(__AVX512F__)

// The 32 bits of a tile's row at b + s · Third + Offset in every lane; Third = row number modulo 3. Volatile
// asm: left to itself gcc 12 loads a tile's activations first and then spills accumulators.
template <int Third, int Offset>
XN_INLINE __m512i broadcast(const uint8_t* base, int64_t stride) {
    __m512i t;
    if constexpr (Third == 0)
        asm volatile("vpbroadcastd %c[o](%[b]), %[t]" : [t] "=v"(t) : [b] "r"(base), [o] "i"(Offset));
    else if constexpr (Third == 1)
        asm volatile("vpbroadcastd %c[o](%[b],%[s]), %[t]"
                     : [t] "=v"(t) : [b] "r"(base), [s] "r"(stride), [o] "i"(Offset));
    else
        asm volatile("vpbroadcastd %c[o](%[b],%[s],2), %[t]"
                     : [t] "=v"(t) : [b] "r"(base), [s] "r"(stride), [o] "i"(Offset));
    return t;
}

// Draws the next `bytes` into L2.
XN_INLINE void draw(const uint8_t*& ahead, int64_t bytes) {
    for (const uint8_t* end = ahead + bytes; ahead != end; ahead += 64)
        _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T1);
}

// Elements [16 · part, 16 · part + 16) of x, of which `count` exist in all; zeros beyond.
XN_INLINE __m512 load_part(const float* x, int64_t count, int part) {
    const int64_t here = count - 16 * part;
    if (here >= 16) return _mm512_loadu_ps(x + 16 * part);
    if (here <= 0) return _mm512_setzero_ps();
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << here) - 1), x + 16 * part);
}

template <int NR>
XN_INLINE void store_row(const Tile& tile, int m, const __m512* acc) {
    float* y = tile.y + m * tile.ldy;
    if (tile.columns >= 16 * NR && tile.bias == nullptr && tile.residual == nullptr) {
        for_each<NR>([&](auto n) XN_LAMBDA { _mm512_storeu_ps(y + 16 * n, acc[n]); });
        return;
    }
    for_each<NR>([&](auto n) XN_LAMBDA {
        const int64_t here = tile.columns - 16 * n;
        const auto mask = static_cast<__mmask16>(here >= 16 ? 0xffffu : (1u << here) - 1);
        __m512 v = acc[n];
        if (tile.bias != nullptr) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, tile.bias + 16 * n));
        if (tile.residual != nullptr)
            v = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, tile.residual + m * tile.ldr + 16 * n), v);
        _mm512_mask_storeu_ps(y + 16 * n, mask, v);
    });
}

#endif

// What plain C++ computes with; gcc lowers these to whatever vectors the target has.
typedef float Lanes __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef int32_t Integers __attribute__((vector_size(64)));

XN_INLINE Lanes as_lanes(Words bits) {
    Lanes out;
    memcpy(&out, &bits, 64);
    return out;
}

// a · b + c: fused where the target has it, else two roundings; never left to the optimiser's choice.
XN_INLINE Lanes multiply_add(const Lanes& a, float b, const Lanes& c) {
#if defined(__FMA__)
    Lanes out;
    for (int half = 0; half < 2; ++half) {
        __m256 p, q;
        memcpy(&p, reinterpret_cast<const char*>(&a) + 32 * half, 32);
        memcpy(&q, reinterpret_cast<const char*>(&c) + 32 * half, 32);
        const __m256 r = _mm256_fmadd_ps(p, _mm256_set1_ps(b), q);
        memcpy(reinterpret_cast<char*>(&out) + 32 * half, &r, 32);
    }
    return out;
#else
    return a * b + c;  // built with -ffp-contract=off
#endif
}

XN_INLINE void store_panel(const Tile& tile, int m, int n, const Lanes& acc) {
    float* y = tile.y + m * tile.ldy + 16 * n;
    for (int64_t i = 0; i < 16 && 16 * n + i < tile.columns; ++i) {
        const float product = tile.bias == nullptr ? acc[i] : acc[i] + tile.bias[16 * n + i];
        y[i] = tile.residual == nullptr ? product : tile.residual[m * tile.ldr + 16 * n + i] + product;
    }
}

}  // namespace xn

#endif  // XLLM_TILE_H
