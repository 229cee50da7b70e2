// Tiles: the inner products of a few rows with a few panels. Every output element is one accumulator that
// runs over K in order by one formula, whatever the tile's shape, so rows do not depend on their company.
// What must not live here: threads, allocation, the choice of a shape.
#ifndef XLLM_GEMM_H
#define XLLM_GEMM_H

#include "xllm/pack.h"

namespace xn {

// A row of activations in 8-bit codes: K codes, then K/32 of these.
struct GroupInfo {
    float scale;
    int32_t start;  // −zero · Σ codes: what the integer accumulator of the group begins with
    float sum;      // scale · Σ codes, what the weight's min is multiplied by
    float unused;
};

struct Tile {
    const uint8_t* x;  // first row, in bf16 or 8-bit codes
    int64_t x_stride;  // bytes between rows
    const uint8_t* w;  // first panel
    int64_t prefetch;  // bytes ahead of `w` to draw into L2 meanwhile
    const xn_matrix* matrix;
    float* y;
    int64_t ldy;
    const float* bias;  // of the first panel's first channel, or NULL
    int64_t columns;    // channels that exist from the first panel on
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
void to_group_row(const float* x, int64_t num_in, int64_t padded_in, int32_t zero, uint8_t* row);

}  // namespace xn

#endif  // XLLM_GEMM_H
