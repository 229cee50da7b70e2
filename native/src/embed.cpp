// Rows of an embedding table, read from the packed matrix so that a tied head needs no second copy.
#include "xllm/rows.h"
#include "xllm/simd.h"
#include "xllm_native.h"

using namespace xn;

extern "C" int32_t xn_embedding(
    xn_pool* pool, const xn_matrix* table, const int64_t* ids, int64_t rows, float scale, float* y,
    int64_t ldy) {
    const int64_t width = xn_matrix_num_in(table), count = xn_matrix_num_out(table);
    for (int64_t row = 0; row < rows; row++)
        if (ids[row] < 0 || ids[row] >= count) return XN_ERR_ARGUMENT;
    // A packed row is strewn over as many cache lines as it has pairs.
    for_rows(pool, rows, 8 * width, [&](int64_t first, int64_t end) {
        xn_matrix_rows(table, ids + first, end - first, y + first * ldy, ldy);
        if (scale == 0.0f) return;
        const vf factor = round_bf16(splat(scale));
        for (int64_t row = first; row < end; row++) {
            float* to = y + row * ldy;
            each_vector(width, [&](int64_t i, auto part) {
                store(to + i, round_bf16(round_bf16(load(to + i, part)) * factor), part);
            });
        }
    });
    return XN_OK;
}
