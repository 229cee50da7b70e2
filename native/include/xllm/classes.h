// What the linear must know of a weight class: how a row of activations is rounded, which tile computes, and
// how many rows that may have. One switch per question, here and nowhere else; a class brings its own file.
#ifndef XLLM_CLASSES_H
#define XLLM_CLASSES_H

#include "xllm/gemm.h"

namespace xn {

int max_tile_rows(const xn_matrix& m, int panels);
TileFn tile_of(const xn_matrix& m, int rows, int panels);

// Bytes that a row of num_in activations takes once rounded, and the rounding.
int64_t rounded_bytes(const xn_matrix& m);
void round_row(const xn_matrix& m, const float* x, uint8_t* row);

// gemm_halves.cpp: 8-bit codes in groups of 16 (XN_W8G16). Rows are K codes, then K/16 GroupInfo.
TileFn halves_tile(int rows, int panels);
void to_halves_row(const float* x, int64_t num_in, int64_t padded_in, int32_t zero, uint8_t* row);

// gemm_channel.cpp: 8-bit codes with one scale per output channel (XN_W8A8). Rows are K codes, then this.
struct ChannelInfo {
    float scale;
    int32_t start;  // −zero · Σ codes: what the integer accumulator of the row begins with
};
// 255 · 127 · K must stay an int32.
constexpr int64_t kMaxChannelInputs = 1 << 16;
constexpr int max_channel_rows(int panels) { return max_bf16_rows(panels); }
TileFn channel_tile(int rows, int panels);
void to_channel_row(const float* x, int64_t num_in, int64_t padded_in, int32_t zero, uint8_t* row);

}  // namespace xn

#endif  // XLLM_CLASSES_H
