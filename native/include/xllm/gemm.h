// Tiles: the inner products of a few rows with a few panels. Every output element is one accumulator that
// runs over K in order by one formula, whatever the tile's shape, so rows do not depend on their company.
// What must not live here: threads, allocation, the choice of a shape.
#ifndef XLLM_GEMM_H
#define XLLM_GEMM_H

#include "xllm/pack.h"

namespace xn {

// A row of activations in 8-bit codes: K codes, then K/32 of these. It serves weights of any zero.
struct GroupInfo {
    float scale;
    float sum;         // scale · Σ codes, what the weight's min is multiplied by
    int32_t start128;  // −128 · Σ codes: what the integer accumulator begins with where zero is 128
    int32_t start8;    // −8 · Σ codes: the same for zero 8; at zero 0 it begins with 0

    int32_t start(int32_t zero) const { return zero == 128 ? start128 : zero == 8 ? start8 : 0; }
};

struct Tile {
    const uint8_t* x;  // first row, in bf16 or 8-bit codes
    int64_t x_stride;  // bytes between rows
    const uint8_t* w;  // first panel
    int64_t prefetch;  // bytes ahead of `w` to draw into L2 meanwhile
    const xn_matrix* matrix;
    float* y;
    int64_t ldy;
    const float* bias;      // of the first panel's first channel, or NULL
    const float* residual;  // added to the first row's element y[0], or NULL; may be y
    int64_t ldr;
    int64_t columns;  // channels that exist from the first panel on
};

using TileFn = void (*)(const Tile&);

constexpr int kMaxTilePanels = 4;

// How many rows a tile of so many panels may have: what 32 vector registers hold without spilling.
constexpr int max_bf16_rows(int panels) { return panels == 4 ? 6 : panels == 3 ? 9 : 12; }
constexpr int max_group_rows(int panels) { return panels == 4 ? 2 : panels == 3 ? 4 : 6; }

TileFn bf16_tile(int rows, int panels);
TileFn group_tile(int rows, int panels, bool four_bits);

// x (num_in floats) → `padded_in` codes at `row`, as the tiles read them.
void to_bf16_row(const float* x, int64_t num_in, int64_t padded_in, uint8_t* row);
void to_group_row(const float* x, int64_t num_in, int64_t padded_in, uint8_t* row);

// What the rest of the linear needs to know of a weight class. A class is added by one more of these.
struct ClassKernels {
    int64_t (*row_bytes)(const xn_matrix& m);  // of a rounded row
    void (*round_row)(const xn_matrix& m, const float* x, uint8_t* row);
    int (*max_rows)(int panels);
    TileFn (*tile)(const xn_matrix& m, int rows, int panels);
};

const ClassKernels& kernels_of(const xn_matrix& m);

// Bytes between rounded rows: an odd number of cache lines, so that rows do not fall on the same sets.
inline int64_t rounded_stride(const xn_matrix& m) {
    return (round_up(kernels_of(m).row_bytes(m), 64) / 64 | 1) * 64;
}

void round_rows(
    xn_pool* pool, const xn_matrix& m, const float* x, int64_t rows, int64_t ldx, uint8_t* rounded);

}  // namespace xn

#endif  // XLLM_GEMM_H
