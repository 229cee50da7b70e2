// One row's scores for a block → weights in bf16, with the running maximum and sums of an online softmax.
// What must not live here: products, pages.
#ifndef XLLM_ATTENTION_WEIGHTS_H
#define XLLM_ATTENTION_WEIGHTS_H

#include <algorithm>

#include "xllm/attention_product.h"

namespace xn::attention {

constexpr float kLowest = -1.0e30f;  // below every score, and finite when scaled

using xn::select;

// Lanes of vector i that a row sees, from a bit for each of the block's positions.
#if defined(__AVX512F__)
using Lanes = __mmask16;
inline Lanes lanes(uint64_t seen, int i) { return Lanes(seen >> (i * kLanes)); }
inline vf select(Lanes mask, vf a, vf b) { return (vf)_mm512_mask_blend_ps(mask, (__m512)b, (__m512)a); }
inline bool any_above(vf x, float limit) {
    return _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(limit), _CMP_GT_OQ) != 0;
}
#else
using Lanes = vi;
inline Lanes lanes(uint64_t seen, int i) {
    vi lane;
    for (int n = 0; n < kLanes; n++) lane[n] = n;
    return ((splat(int32_t(seen >> (i * kLanes) & 0xff)) >> lane) & splat(int32_t(1))) > splat(int32_t(0));
}
inline bool any_above(vf x, float limit) { return highest(x) > limit; }
#endif

// Positions first … last of a block, either of which may lie outside it.
inline uint64_t seen_between(int64_t first, int64_t last) {
    if (last < 0 || first >= kPage) return 0;
    return (~uint64_t{0} >> (kPage - 1 - std::min<int64_t>(last, kPage - 1)))
        & (~uint64_t{0} << std::max<int64_t>(first, 0));
}

inline void scale_scores(float* scores, int vectors, const float* scales) {
    for (int i = 0; i < vectors; i++)
        store(scores + i * kLanes, load(scores + i * kLanes) * load(scales + i * kLanes));
}

inline void cap_scores(float* scores, int vectors, float scale, float softcap) {
    for (int i = 0; i < vectors; i++) {
        float* at = scores + i * kLanes;
        store(at, xn::tanh(load(at) * splat(scale) / splat(softcap)) * splat(softcap));
    }
}

// Rounds weights to bf16 pairs and adds what they are now to the lanes of `total`.
template <int kMost>
inline vf keep_weights(const vf* w, int vectors, vf total, uint16_t* weights) {
#if defined(__AVX512BF16__)
    const __m512bh ones = (__m512bh)_mm512_set1_epi32(0x3f803f80);
    __m512 sum = (__m512)total;
#pragma GCC unroll 8
    for (int i = 0; i < kMost; i += 2) {
        if (i >= vectors) break;
        const __m512 odd = i + 1 < vectors ? (__m512)w[i + 1] : _mm512_setzero_ps();
        const __m512bh pairs = _mm512_cvtne2ps_pbh(odd, (__m512)w[i]);
        _mm512_storeu_si512(weights + i * kLanes, (__m512i)pairs);
        sum = _mm512_dpbf16_ps(sum, pairs, ones);
    }
    return (vf)sum;
#else
    for (int i = 0; i < vectors; i++) total += store_bf16(weights + i * kLanes, w[i]);
    return total;
#endif
}

// What a folded row keeps from block to block.
struct Row {
    float& most;    // highest score so far
    float* totals;  // weights so far, lane by lane
    float* sums;    // weighted V so far
};

// What a block's codes are multiplied by, position by position; null where pages hold values.
struct Scales {
    const float *keys, *values;
};

// Scores of one row for `vectors` vectors of positions → weights 2^((score − highest) · factor) as bf16.
// Scales what was summed so far when the highest rises. kAll: every position of the block is seen.
// Scales of V go into the weights before they are rounded, but not into their sum.
template <bool kAll, bool kCoded>
inline void weigh(
    const float* scores, int vectors, uint64_t seen, float factor, const Row& row, int64_t head_dim,
    const Scales& scales, uint16_t* weights) {
    constexpr int kMost = kPage / kLanes;
    if (kAll) vectors = kMost;
    vf s[kMost];
    vf top = splat(kLowest);
#pragma GCC unroll 16
    for (int i = 0; i < kMost; i++) {
        if (i >= vectors) break;
        s[i] = load(scores + i * kLanes);
        if (!kAll) s[i] = select(lanes(seen, i), s[i], splat(kLowest));
        top = max(s[i], top);
    }
    vf total = load(row.totals);
    if (__builtin_expect(any_above(top, row.most), 0)) {
        const float after = highest(top);
        const vf shrink = exp2_of_negative(splat((row.most - after) * factor));
        row.most = after;
        total *= shrink;
        for (int64_t d = 0; d < head_dim; d += kLanes) store(row.sums + d, load(row.sums + d) * shrink);
    }
    const vf offset = splat(-row.most * factor);
#pragma GCC unroll 16
    for (int i = 0; i < kMost; i++) {
        if (i >= vectors) break;
        s[i] = weight_of(fma(s[i], splat(factor), offset));
        if (!kAll) s[i] = select(lanes(seen, i), s[i], vf{});
        if (kCoded) {
            total += s[i];
            s[i] *= load(scales.values + i * kLanes);
        }
    }
    const vf rounded = keep_weights<kMost>(s, vectors, total, weights);
    store(row.totals, kCoded ? total : rounded);
}

}  // namespace xn::attention

#endif  // XLLM_ATTENTION_WEIGHTS_H
