// Tiles: the inner products of a few rows with a few panels. Every output element is one accumulator that
// runs over K in order by one formula, whatever the tile's shape, so rows do not depend on their company.
// What must not live here: threads, allocation, the choice of a shape.
#ifndef XLLM_GEMM_H
#define XLLM_GEMM_H

#include "xllm/pack.h"

namespace xn {

#if defined(__AVX512VNNI__)
constexpr int64_t kGroupCodeBytes = 1;  // that a code of an activation, or of an unpacked weight, takes
#else
constexpr int64_t kGroupCodeBytes = 2;  // ready for multiplications of words
#endif

// A row of activations in 8-bit codes: K codes, then K/32 of these. It serves weights of any zero.
struct GroupInfo {
    float scale;
    float sum;         // scale · Σ codes, what the weight's min is multiplied by
    int32_t start128;  // −128 · Σ codes: what the integer accumulator begins with where zero is 128
    int32_t start8;    // −8 · Σ codes: the same for zero 8; at zero 0 it begins with 0

    int32_t start(int32_t zero) const { return zero == 128 ? start128 : zero == 8 ? start8 : 0; }
};

struct Tile {
    const uint8_t* x;  // first row, rounded
    int64_t x_stride;  // bytes between rows
    const xn_matrix* matrix;
    const uint8_t* w;  // first panel, of the matrix or unpacked from it
    int64_t w_stride;  // bytes between panels
    const uint8_t* scales;  // of the first panel
    const uint8_t* mins;    // NULL = none
    bool half;              // scales and mins are float16
    const uint8_t* ahead;  // what to draw into L2 meanwhile,
    int64_t ahead_bytes;   // so much (whole cache lines) in every step of the tile
    float* y;
    int64_t ldy;
    const float* bias;      // of the first panel's first channel, or NULL
    const float* residual;  // added to the first row's element y[0], or NULL; may be y
    int64_t ldr;
    int64_t columns;  // channels that exist from the first panel on
};

using TileFn = void (*)(const Tile&);

constexpr int kMaxTilePanels = 4;

// x (num_in floats) → `padded_in` codes at `row`, as the tiles read them.
void to_bf16_row(const float* x, int64_t num_in, int64_t padded_in, uint8_t* row);
void to_group_row(const float* x, int64_t num_in, int64_t padded_in, uint8_t* row);

// What the linear needs to know of a weight class. A class is added by one more of these.
struct ClassKernels {
    int64_t (*row_bytes)(const xn_matrix& m);  // of a rounded row
    void (*round_row)(const xn_matrix& m, const float* x, uint8_t* row);
    int (*max_rows)(int panels);  // of a tile: what the vector registers hold without spilling
    TileFn (*tile)(int rows, int panels);
    int64_t step;  // inputs of a step, see Tile::ahead_bytes
    // Where tiles do not read panels as they are packed: an item first unpacks its panels, each to
    // unpacked_bytes of codes, float32 scales and mins. Else NULL.
    int64_t (*unpacked_bytes)(const xn_matrix& m);
    void (*unpack)(const xn_matrix& m, const uint8_t* panel, uint8_t* to);
};

extern const ClassKernels kBf16, kW8G32, kW4G32, kW8G16, kW8A8;

const ClassKernels& kernels_of(const xn_matrix& m);

// Bytes between rounded rows: an odd number of cache lines, so that rows do not fall on the same sets.
inline int64_t rounded_stride(const xn_matrix& m) {
    return (round_up(kernels_of(m).row_bytes(m), 64) / 64 | 1) * 64;
}

void round_rows(
    xn_pool* pool, const xn_matrix& m, const float* x, int64_t rows, int64_t ldx, uint8_t* rounded);

}  // namespace xn

#endif  // XLLM_GEMM_H
