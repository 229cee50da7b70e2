// Passes over a whole row of logits: its maximum, the tokens above a bound, the sum of its weights.
// They work on untempered logits as far as order allows, and divide the few that matter.
// What must not live here: what the sampler's parameters mean.
#ifndef XLLM_LOGITS_H
#define XLLM_LOGITS_H

#include "xllm/nucleus.h"

namespace xn {

constexpr int64_t kBlock = 64 * kLanes;  // a group's maximum stands for one lane of 64 vectors
constexpr int64_t kPad = 64;

struct Top {
    float value;
    int64_t id;   // of the first that has it
    bool broken;  // NaN somewhere
};

// One worker's memory. Arrays of 8-byte elements come first, so that all are aligned.
struct Scratch {
    Tokens tokens;
    uint32_t* keys;
    int64_t* sums;
    float *masked, *maxima;
    int64_t num_groups;

    static int64_t bytes(int64_t vocab) { return (vocab + kPad) * (2 * 8 + 5 * 4); }

    Scratch(char* at, int64_t vocab) {
        const int64_t room = vocab + kPad;
        const auto take = [&](int64_t size) { return at += room * size, at - room * size; };
        tokens.weight = reinterpret_cast<int64_t*>(take(8));
        sums = reinterpret_cast<int64_t*>(take(8));
        tokens.ids = reinterpret_cast<int32_t*>(take(4));
        tokens.y = reinterpret_cast<float*>(take(4));
        keys = reinterpret_cast<uint32_t*>(take(4));
        masked = reinterpret_cast<float*>(take(4));
        maxima = reinterpret_cast<float*>(take(4));
        tokens.count = num_groups = 0;
    }
};

inline vf load_or_lowest(const float* from, Whole) { return load(from); }
inline vf load_or_lowest(const float* from, Part part) {
    vf x = splat(-INFINITY);
    std::memcpy(&x, from, part.count * sizeof(float));
    return x;
}

inline Top scan(const float* x, int64_t n, Scratch& scratch) {
    vi broken{};
    vf most = splat(-INFINITY);
    scratch.num_groups = 0;
    for (int64_t first = 0; first < n; first += kBlock) {
        vf high[2] = {splat(-INFINITY), splat(-INFINITY)};
        each_vector(std::min(kBlock, n - first), [&](int64_t i, auto part) {
            const vf v = load_or_lowest(x + first + i, part);
            vf& into = high[(i / kLanes) & 1];
            into = higher(v, into);
            broken |= v != v;
        });
        high[0] = higher(high[0], high[1]);
        store(scratch.maxima + scratch.num_groups, high[0]);
        scratch.num_groups += kLanes;
        most = higher(most, high[0]);
    }
    Top top{highest(most), 0, false};
    for (int i = 0; i < kLanes; ++i) top.broken |= broken[i] != 0;
    if (top.broken || !(top.value > -INFINITY)) return top;
    int64_t group = 0;
    while (at_least(load(scratch.maxima + group), splat(top.value)) == 0) group += kLanes;
    for (top.id = group * 64; x[top.id] != top.value;) ++top.id;
    return top;
}

inline void mask(const float* x, int64_t n, const uint32_t* allowed, float* y) {
    for (int64_t i = 0; i < n; ++i) y[i] = allowed[i >> 5] >> (i & 31) & 1 ? x[i] : -INFINITY;
}

// Not above any logit that lies at most `depth` below the top when tempered.
inline float floor_of(const Top& top, float temperature, double depth) {
    const double t = temperature, x = top.value;
    const double low = x - depth * t - (std::fabs(x) + depth * t) * 1e-6 - 1e-37;
    return low < -3e38 ? -INFINITY : float(low);
}

// Not above the k-th largest logit, and not below `low`. Groups are disjoint, so k groups whose maxima
// reach a value hold k logits that do.
inline float kth_bound(const Scratch& scratch, int64_t k, float low, float high) {
    if (k > scratch.num_groups || low == -INFINITY) return low;
    for (int step = 0; step < 14 && low < high; ++step) {
        const float middle = low / 2 + high / 2;
        int64_t count = 0;
        for (int64_t g = 0; g < scratch.num_groups; g += kLanes)
            count += __builtin_popcount(at_least(load(scratch.maxima + g), splat(middle)));
        (count >= k ? low : high) = middle;
    }
    return low;
}

// All tokens that are not below `low` when both are tempered: equal ones are in or out together.
inline void collect(const float* x, int64_t n, float low, float temperature, Tokens& tokens) {
    const float y_low = low / temperature;
    const float before_rounding = low - std::fabs(low) * 1e-6f - 1e-37f;
    int64_t count = 0, kept = 0;
    each_vector(n, [&](int64_t i, auto part) {
        uint32_t found = at_least(load_or_lowest(x + i, part), splat(before_rounding));
        for (; found != 0; found &= found - 1) {
            const int64_t id = i + __builtin_ctz(found);
            if (id >= n) return;
            tokens.ids[count] = int32_t(id);
            tokens.y[count++] = x[id];
        }
    });
    std::fill(tokens.y + count, tokens.y + count + kLanes, 0.0f);
    for (int64_t i = 0; i < count; i += kLanes)
        store(tokens.y + i, load(tokens.y + i) / splat(temperature));
    for (int64_t i = 0; i < count; ++i) {
        tokens.ids[kept] = tokens.ids[i], tokens.y[kept] = tokens.y[i];
        kept += tokens.y[i] >= y_low;
    }
    tokens.count = kept;
}

// The exact sum of the row's weights.
__attribute__((noinline)) inline int64_t weight_of_all(const float* x, int64_t n, const Top& top, float temperature) {
    const float y_top = top.value / temperature;
    const vf low = splat(floor_of(top, temperature, kDepth));
    vu sums{};
    each_vector(n, [&](int64_t i, auto part) {
        const vf v = load_or_lowest(x + i, part);
        if (at_least(v, low) == 0) return;
        float y[kLanes];
        store(y, v / splat(temperature));
        sums += weights_of(widened(y), y_top) + weights_of(widened(y + kWide), y_top);
    });
    int64_t sum = 0;
    for (int i = 0; i < kWide; ++i) sum += int64_t(sums[i]);
    return sum;
}

struct Range {
    double low, high;
};

// A range that holds the exact sum, for a quarter of its price. Where the ends decide alike it is not needed.
__attribute__((noinline)) inline Range about_all(const float* x, int64_t n, const Top& top, float temperature) {
    const vf highest_x = splat(top.value), scale = splat(1.0f / temperature);
    double total = 0;
    for (int64_t first = 0; first < n; first += kBlock) {
        vf sums[2] = {};
        each_vector(std::min(kBlock, n - first), [&](int64_t i, auto part) {
            sums[(i / kLanes) & 1] += xn::exp((load_or_lowest(x + first + i, part) - highest_x) * scale);
        });
        total += sum(sums[0] + sums[1]);
    }
    // Three roundings of a distance of at most 31, two of y, 36 of a sum, two of exp; and a weight is cut to
    // whole units. Whatever is further away adds less than 2⁻⁴³ a token either way.
    const double slack = 2e-5 + 3e-7 * std::fabs(double(top.value) / temperature);
    return Range{total * kWeightOne * (1 - slack), total * kWeightOne * (1 + slack)};
}

}  // namespace xn

#endif  // XLLM_LOGITS_H
