// Tiles of attention's two products: a few folded rows times a block's K or V, both in pairs of bf16.
// What must not live here: pages, rows of a step, masks.
#ifndef XLLM_ATTENTION_PRODUCT_H
#define XLLM_ATTENTION_PRODUCT_H

#include "xllm/simd.h"
#include "xllm_native.h"

namespace xn::attention {

constexpr int kPage = XN_PAGE_SIZE;
constexpr int kRows = 6;          // folded rows of a tile: 6 · 4 accumulators of the 32 registers
constexpr int kColumns = 16;      // of an accumulator
constexpr int kWide = 4;          // accumulators side by side
constexpr int kLine = 32;         // elements of a cache line

// Cache lines that will be wanted next: `lines` of them at each step of `stride` elements. No more than that,
// since decoding is bound by what memory delivers.
struct Ahead {
    const uint16_t* from;
    int64_t stride;
    int lines;  // 0 = nothing
};

// c[M][16·N] (+)= a[M][pairs] · b[pairs][16·N], all in pairs of bf16; one accumulator per element, in order.
#if defined(__AVX512BF16__)
template <int M, int N>
void tile_product(
    const uint32_t* a, int64_t lda, const uint16_t* b, int64_t ldb, int64_t pairs, float* c, int64_t ldc,
    bool add, Ahead ahead) {
    __m512 sums[M][N];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
        for (int n = 0; n < N; n++)
            sums[m][n] = add ? _mm512_loadu_ps(c + m * ldc + n * kColumns) : _mm512_setzero_ps();
    for (int64_t p = 0; p < pairs; p++) {
        for (int n = 0; n < ahead.lines; n++)
            _mm_prefetch(ahead.from + p * ahead.stride + n * kLine, _MM_HINT_T1);
        __m512i right[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; n++)
            asm volatile("vmovdqu32 %1, %0"
                         : "=v"(right[n])
                         : "m"(*reinterpret_cast<const __m512i*>(b + p * ldb + n * 2 * kColumns)));
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            __m512i left;
            asm volatile("vpbroadcastd %1, %0" : "=v"(left) : "m"(a[m * lda + p]));
#pragma GCC unroll 8
            for (int n = 0; n < N; n++)
                asm volatile("vdpbf16ps %2, %1, %0" : "+v"(sums[m][n]) : "v"(left), "v"(right[n]));
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) _mm512_storeu_ps(c + m * ldc + n * kColumns, sums[m][n]);
}
#else
template <int M, int N>
void tile_product(
    const uint32_t* a, int64_t lda, const uint16_t* b, int64_t ldb, int64_t pairs, float* c, int64_t ldc,
    bool add, Ahead) {
    constexpr int kVectors = N * kColumns / kLanes;
    for (int m = 0; m < M; m++)
        for (int n = 0; n < kVectors; n++) {
            float* to = c + m * ldc + n * kLanes;
            vf total = add ? load(to) : vf{};
            for (int64_t p = 0; p < pairs; p++) {
                vi right;
                std::memcpy(&right, b + p * ldb + n * 2 * kLanes, sizeof right);
                const vi high = splat(int32_t(0xffff0000));
                const int32_t left = int32_t(a[m * lda + p]);
                total = fma(floats(splat(int32_t(uint32_t(left) << 16))), floats(right << 16), total);
                total = fma(floats(splat(left) & high), floats(right & high), total);
            }
            store(to, total);
        }
}
#endif

using Product = void (*)(
    const uint32_t*, int64_t, const uint16_t*, int64_t, int64_t, float*, int64_t, bool, Ahead);

#define XN_ROW(M) \
    { tile_product<M, 1>, tile_product<M, 2>, tile_product<M, 3>, tile_product<M, 4> }
constexpr Product kProducts[kRows][kWide] = {XN_ROW(1), XN_ROW(2), XN_ROW(3), XN_ROW(4), XN_ROW(5), XN_ROW(6)};
#undef XN_ROW

}  // namespace xn::attention

#endif  // XLLM_ATTENTION_PRODUCT_H
