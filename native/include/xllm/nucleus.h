// Prefixes of a row's tokens in the order "larger logit first, then smaller id": what top_k, top_p and min_p
// leave is always one. A cut is found by counting in buckets, without sorting, by exact integer sums.
// Definitions: docs/design/0002-sampler.md. What must not live here: noise, the passes over whole rows.
#ifndef XLLM_NUCLEUS_H
#define XLLM_NUCLEUS_H

#include <algorithm>

#include "xllm/noise.h"

namespace xn {

constexpr double kWeightOne = 0x1p44;
constexpr float kDepth = 31.0f;  // tokens further below the top weigh nothing and cannot be lifted by noise

// floor(2⁴⁴ · exp(y − top)) in every lane, as integers.
inline vu weights_of(vd y, double top) {
    constexpr double c[8] = {
        0x1.0000000000000p+0, 0x1.62e42fefa39efp-1, 0x1.ebfbdff82c58fp-3, 0x1.c6b08d704a0c0p-5,
        0x1.3b2ab6fba4e77p-7, 0x1.5d87fe78a6731p-10, 0x1.430912f86c787p-13, 0x1.ffcbfc588b0c7p-17,
    };
    const vd low = vd{} - 44.0, magic = vd{} + 0x1.8p52, unit = vd{} + 0x1p52;
    vd d = y - top;
    d = (vd)(((vu)d & (vu)(d > low)) | ((vu)low & (vu)(d <= low)));
    d *= kLog2E;
    const vd shifted = d + magic, m = shifted - magic, r = d - m;
    vd p = r * c[7];
    for (int k = 6; k > 0; --k) p = (p + c[k]) * r;
    p = (p + c[0]) * kWeightOne;
    // Powers of two multiply exactly, so one floor at the end equals the definition's floor and shift.
    p *= (vd)(((vu)shifted - (vu)magic + 1023) << 52);
    vd whole = (p + unit) - unit;
    whole -= (vd)((vu)(vd{} + 1.0) & (vu)(whole > p));
    return (vu)(whole + unit) - (vu)unit;
}

typedef float half_vf __attribute__((vector_size(kWide * 4)));

inline vd widened(const float* from) {
    half_vf x;
    std::memcpy(&x, from, sizeof x);
    return __builtin_convertvector(x, vd);
}

// Tokens that may still be drawn, ids ascending. Arrays have room for kLanes more than there can be.
struct Tokens {
    int32_t* ids;
    float* y;         // tempered logits
    int64_t* weight;  // filled by weigh()
    int64_t count;
};

// Fills the weights; returns their sum.
inline int64_t weigh(Tokens& tokens, float top) {
    for (int i = 0; i < kWide; ++i) tokens.y[tokens.count + i] = -INFINITY;
    vu sums{};
    for (int64_t i = 0; i < tokens.count; i += kWide) {
        const vu w = weights_of(widened(tokens.y + i), top);
        std::memcpy(tokens.weight + i, &w, sizeof w);
        sums += w;
    }
    int64_t sum = 0;
    for (int i = 0; i < kWide; ++i) sum += int64_t(sums[i]);
    return sum;
}

// Ascends where y descends; −0 and 0 are one.
inline uint32_t order_key(float y) {
    y += 0.0f;
    uint32_t b;
    std::memcpy(&b, &y, 4);
    return ~(b ^ (b >> 31 ? 0xffffffffu : 0x80000000u));
}

// Where a prefix ends: keys below `key` are in, and of those equal to it the first `ties`.
struct Cut {
    uint32_t key;
    int64_t ties;
    bool operator==(const Cut& other) const { return key == other.key && ties == other.ties; }
};

constexpr Cut kNoCut{0xffffffffu, INT64_MAX};

// Looks for the bucket in which the sum reaches the target; adds what lies before it to `before`.
inline int64_t reach(const int64_t* buckets, int64_t num_buckets, double target, int64_t& before) {
    for (int64_t b = 0; b < num_buckets; ++b) {
        if (double(before + buckets[b]) >= target) return b;
        before += buckets[b];
    }
    return num_buckets;
}

// The prefix of tokens whose predecessors' sum, as a double, is below the target. Summed is the weight, or
// one for each token where `counting`. `keys` and `sums` are room for as many as there are tokens.
inline Cut find_cut(
    const Tokens& tokens, float top, double target, bool counting, uint32_t* keys, int64_t* sums) {
    constexpr int kCoarse = 2048, kFine = 256;
    constexpr float kSteps = kCoarse / (kDepth + 1);
    const auto bucket_of = [&](float y) {
        const float far = (top - y) * kSteps;
        return far < kCoarse - 1 ? int(far) : kCoarse - 1;
    };
    int64_t buckets[kCoarse] = {}, before = 0;
    for (int64_t i = 0; i < tokens.count; ++i)
        buckets[bucket_of(tokens.y[i])] += counting ? 1 : tokens.weight[i];
    const int64_t coarse = reach(buckets, kCoarse, target, before);
    if (coarse == kCoarse) return kNoCut;
    int64_t count = 0;
    for (int64_t i = 0; i < tokens.count; ++i) {
        if (bucket_of(tokens.y[i]) != coarse) continue;
        keys[count] = order_key(tokens.y[i]);
        sums[count++] = counting ? 1 : tokens.weight[i];
    }
    for (int shift = 24; shift >= 0; shift -= 8) {
        std::fill(buckets, buckets + kFine, 0);
        for (int64_t i = 0; i < count; ++i) buckets[keys[i] >> shift & 255] += sums[i];
        const int64_t found = reach(buckets, kFine, target, before);
        int64_t kept = 0;
        for (int64_t i = 0; i < count; ++i)
            if ((keys[i] >> shift & 255) == uint32_t(found)) keys[kept] = keys[i], sums[kept++] = sums[i];
        count = kept;
    }
    // Equal logits are left; how many of them begin below the target.
    int64_t low = 0, high = count;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (double(before + middle * sums[0]) < target)
            low = middle + 1;
        else
            high = middle;
    }
    return Cut{keys[0], low};
}

inline void apply(Tokens& tokens, Cut cut) {
    if (cut == kNoCut) return;
    int64_t kept = 0;
    for (int64_t i = 0; i < tokens.count; ++i) {
        const uint32_t key = order_key(tokens.y[i]);
        if (key > cut.key || (key == cut.key && cut.ties-- <= 0)) continue;
        tokens.ids[kept] = tokens.ids[i], tokens.y[kept] = tokens.y[i];
        tokens.weight[kept++] = tokens.weight[i];
    }
    tokens.count = kept;
}

}  // namespace xn

#endif  // XLLM_NUCLEUS_H
