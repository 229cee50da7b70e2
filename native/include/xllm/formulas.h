// Row formulas that an operation and its fused form share, so that fusing changes no bit.
// What must not live here: threads, and formulas that only one file computes.
#ifndef XLLM_FORMULAS_H
#define XLLM_FORMULAS_H

#include "xllm/simd.h"

namespace xn {

// Sum of squares; the order depends on the width alone.
inline float sum_of_squares(const float* x, int64_t width) {
    vf sums[4] = {vf{}, vf{}, vf{}, vf{}};
    each_vector(width, [&](int64_t i, auto part) {
        vf v = load(x + i, part);
        vf& into = sums[(i / kLanes) & 3];
        into = fma(v, v, into);
    });
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

inline void norm_row(
    const float* x, int64_t width, const float* weight, float eps, float offset, float* y) {
    const float mean = sum_of_squares(x, width) / float(width);
    const vf factor = splat(1.0f / std::sqrt(mean + eps));
    each_vector(width, [&](int64_t i, auto part) {
        const vf scaled = load(x + i, part) * factor;
        store(y + i, scaled * (load(weight + i, part) + splat(offset)), part);
    });
}

inline vf silu(vf g) { return g / (xn::exp(-g) + splat(1.0f)); }

inline vf gelu_tanh(vf g) {
    const vf cube = g * g * g;
    const vf inner = splat(0.797884560802865f) * fma(splat(0.044715f), cube, g);
    return splat(0.5f) * g * (xn::tanh(inner) + splat(1.0f));
}

template <class F>
inline void gate_row(const float* gate, const float* up, int64_t width, float* y, F activate) {
    each_vector(width, [&](int64_t i, auto part) {
        store(y + i, activate(load(gate + i, part)) * load(up + i, part), part);
    });
}

}  // namespace xn

#endif  // XLLM_FORMULAS_H
