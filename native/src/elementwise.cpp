// Norms, activations, rotary positions, sums: one row at a time, each vector of a row by the same code.
#include "xllm/formulas.h"
#include "xllm/rows.h"
#include "xllm_native.h"

using namespace xn;

namespace {

template <class F>
int32_t gated(
    xn_pool* pool, const float* x, int64_t ldx, int64_t rows, int64_t width, float* y, int64_t ldy, F activate) {
    for_rows(pool, rows, 4 * width, [&](int64_t first, int64_t end) {
        for (int64_t row = first; row < end; row++) {
            const float* gate = x + row * ldx;
            gate_row(gate, gate + width, width, y + row * ldy, activate);
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
                const int64_t from = part_of_row * width;
                norm_row(x + row * ldx + from, width, weight, eps, offset, y + row * ldy + from);
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
    return gated(pool, gate_up, ldx, rows, width, y, ldy, [](vf g) { return silu(g); });
}

int32_t xn_gelu_tanh_mul(
    xn_pool* pool, const float* gate_up, int64_t ldx, int64_t rows, int64_t width, float* y, int64_t ldy) {
    return gated(pool, gate_up, ldx, rows, width, y, ldy, [](vf g) { return gelu_tanh(g); });
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
