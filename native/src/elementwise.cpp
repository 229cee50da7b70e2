// Norms, activations, rotary positions, sums: one row at a time, each vector of a row by the same code.
#include "xllm/rows.h"
#include "xllm/simd.h"
#include "xllm_native.h"

using namespace xn;

namespace {

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

template <class F>
int32_t gated(
    xn_pool* pool, const float* x, int64_t ldx, int64_t rows, int64_t width, float* y, int64_t ldy, F activate) {
    for_rows(pool, rows, 4 * width, [&](int64_t first, int64_t end) {
        for (int64_t row = first; row < end; row++) {
            const float* gate = x + row * ldx;
            const float* up = gate + width;
            float* to = y + row * ldy;
            each_vector(width, [&](int64_t i, auto part) {
                store(to + i, activate(load(gate + i, part)) * load(up + i, part), part);
            });
        }
    });
    return XN_OK;
}

}  // namespace

extern "C" {

int32_t xn_abi_version(void) { return XN_ABI_VERSION; }

const char* xn_isa(void) {
#if defined(__AVX512BF16__)
    return "avx512bf16";
#elif defined(__AVX2__)
    return "avx2";
#else
    return "portable";
#endif
}

int32_t xn_rms_norm(
    xn_pool* pool, const float* x, int64_t rows, int64_t n, int64_t width, int64_t ldx, const float* weight,
    float eps, float offset, float* y, int64_t ldy) {
    for_rows(pool, rows, n * width, [&](int64_t first, int64_t end) {
        for (int64_t row = first; row < end; row++) {
            for (int64_t part_of_row = 0; part_of_row < n; part_of_row++) {
                const float* from = x + row * ldx + part_of_row * width;
                float* to = y + row * ldy + part_of_row * width;
                float mean = sum_of_squares(from, width) / float(width);
                vf factor = splat(1.0f / std::sqrt(mean + eps));
                each_vector(width, [&](int64_t i, auto part) {
                    vf scaled = load(from + i, part) * factor;
                    store(to + i, scaled * (load(weight + i, part) + splat(offset)), part);
                });
            }
        }
    });
    return XN_OK;
}

int32_t xn_add(
    xn_pool* pool, const float* x, int64_t ldx, const float* y, int64_t ldy, int64_t rows, int64_t width,
    float* z, int64_t ldz) {
    for_rows(pool, rows, width, [&](int64_t first, int64_t end) {
        for (int64_t row = first; row < end; row++) {
            const float *a = x + row * ldx, *b = y + row * ldy;
            float* to = z + row * ldz;
            each_vector(width, [&](int64_t i, auto part) {
                store(to + i, load(a + i, part) + load(b + i, part), part);
            });
        }
    });
    return XN_OK;
}

int32_t xn_silu_mul(
    xn_pool* pool, const float* gate_up, int64_t ldx, int64_t rows, int64_t width, float* y, int64_t ldy) {
    return gated(pool, gate_up, ldx, rows, width, y, ldy, [](vf g) {
        return g / (xn::exp(-g) + splat(1.0f));
    });
}

int32_t xn_gelu_tanh_mul(
    xn_pool* pool, const float* gate_up, int64_t ldx, int64_t rows, int64_t width, float* y, int64_t ldy) {
    return gated(pool, gate_up, ldx, rows, width, y, ldy, [](vf g) {
        vf cube = g * g * g;
        vf inner = splat(0.797884560802865f) * fma(splat(0.044715f), cube, g);
        return splat(0.5f) * g * (xn::tanh(inner) + splat(1.0f));
    });
}

int32_t xn_softcap(
    xn_pool* pool, const float* x, int64_t ldx, int64_t rows, int64_t width, float cap, float* y, int64_t ldy) {
    // Few rows are wide here (logits), so a row is cut too.
    const int64_t cut = 4096, pieces = (width + cut - 1) / cut;
    for_rows(pool, rows * pieces, cut * 3, [&](int64_t first, int64_t end) {
        for (int64_t piece = first; piece < end; piece++) {
            int64_t row = piece / pieces, from = (piece % pieces) * cut;
            const float* a = x + row * ldx + from;
            float* to = y + row * ldy + from;
            each_vector(std::min(cut, width - from), [&](int64_t i, auto part) {
                store(to + i, xn::tanh(load(a + i, part) / splat(cap)) * splat(cap), part);
            });
        }
    });
    return XN_OK;
}

int32_t xn_rope(
    xn_pool* pool, const float* x, int64_t ldx, int64_t rows, int64_t num_heads, int64_t half,
    const float* cos, const float* sin, int64_t ldr, float* y, int64_t ldy) {
    for_rows(pool, rows, num_heads * half * 2, [&](int64_t first, int64_t end) {
        for (int64_t row = first; row < end; row++) {
            const float *c = cos + row * ldr, *s = sin + row * ldr;
            for (int64_t head = 0; head < num_heads; head++) {
                const float* a = x + row * ldx + head * 2 * half;
                float* to = y + row * ldy + head * 2 * half;
                each_vector(half, [&](int64_t i, auto part) {
                    vf u = load(a + i, part), v = load(a + half + i, part);
                    vf cv = load(c + i, part), sv = load(s + i, part);
                    store(to + i, fma(u, cv, -(v * sv)), part);
                    store(to + half + i, fma(v, cv, u * sv), part);
                });
            }
        }
    });
    return XN_OK;
}

int32_t xn_select_rows(
    xn_pool* pool, const float* x, int64_t ldx, const int64_t* ids, int64_t rows, int64_t width, float* y,
    int64_t ldy) {
    for_rows(pool, rows, width, [&](int64_t first, int64_t end) {
        for (int64_t row = first; row < end; row++)
            std::memcpy(y + row * ldy, x + ids[row] * ldx, width * sizeof(float));
    });
    return XN_OK;
}

}  // extern "C"
