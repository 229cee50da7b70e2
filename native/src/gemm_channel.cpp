// Tiles of 8-bit codes with one scale per output channel and one per row: integer sums over all of K, exact
// in any order, then one float32 update. The fastest class and the least accurate: a row's largest input
// sets the step of all others.
//   y = (sum · weight scale) · activation scale
#include "xllm/dot.h"
#include "xllm/rounding.h"

namespace xn {
namespace {

constexpr int kUnroll = 4;  // steps of four inputs; K is a multiple of 32

// A row is K codes, then this.
struct ChannelInfo {
    float scale;
    int32_t start;  // −128 · Σ codes: what the integer accumulator of the row begins with
};

const ChannelInfo& info_of(const Tile& tile, int m) {
    return *reinterpret_cast<const ChannelInfo*>(tile.x + m * tile.x_stride + tile.matrix->padded_in);
}

#if defined(__AVX512VNNI__)

template <int MR, int NR>
void tile(const Tile& tile) {
    constexpr int kBases = (MR + 2) / 3;
    const xn_matrix& matrix = *tile.matrix;
    const int64_t stride = tile.x_stride, w_stride = tile.w_stride, bytes = tile.ahead_bytes;
    __m512i dot[MR][NR];
    for_each<MR>([&](auto m) XN_LAMBDA {
        const __m512i start = _mm512_set1_epi32(info_of(tile, m).start);
        for_each<NR>([&](auto n) XN_LAMBDA { dot[m][n] = start; });
    });
    const uint8_t* b[kBases];
    for_each<kBases>([&](auto i) XN_LAMBDA { b[i] = tile.x + 3 * i * stride; });
    const uint8_t *w = tile.w, *ahead = tile.ahead;
    for (int64_t k = matrix.padded_in / (4 * kUnroll); k > 0; --k) {
        draw(ahead, bytes);
        for_each<kUnroll>([&](auto u) XN_LAMBDA {
            __m512i lanes[NR];
            for_each<NR>([&](auto n) XN_LAMBDA {
                lanes[n] = _mm512_load_si512(w + n * w_stride + 64 * u);
            });
            for_each<MR>([&](auto m) XN_LAMBDA {
                multiply_codes<NR>(broadcast<m % 3, 4 * u>(b[m / 3], stride), lanes, dot[m]);
            });
        });
        w += 64 * kUnroll;
        for_each<kBases>([&](auto i) XN_LAMBDA { b[i] += 4 * kUnroll; });
    }
    __m512 scale[NR];
    for_each<NR>([&](auto n) XN_LAMBDA {
        scale[n] = scales_at(tile.scales + n * w_stride, tile.half);
    });
    for_each<MR>([&](auto m) XN_LAMBDA {
        __m512 y[NR];
        const __m512 factor = _mm512_set1_ps(info_of(tile, m).scale);
        for_each<NR>([&](auto n) XN_LAMBDA {
            y[n] = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(dot[m][n]), scale[n]), factor);
        });
        store_row<NR>(tile, m, y);
    });
}

#else

template <int MR, int NR>
void tile(const Tile& tile) {
    const xn_matrix& matrix = *tile.matrix;
    for (int n = 0; n < NR; ++n) {
        PairSums sums[MR];
        for (int m = 0; m < MR; ++m) sums[m].clear();
        const uint8_t* panel = tile.w + n * tile.w_stride;
        for (int64_t k = 0; k < matrix.padded_in; k += 4) {
            Step step;
            step.load(panel + k * kPanel);
            for (int m = 0; m < MR; ++m) add_products(step, tile.x + m * tile.x_stride + k, sums[m]);
        }
        const Lanes scale = scales_at(tile.scales + n * tile.w_stride, tile.half);
        for (int m = 0; m < MR; ++m) {
            const ChannelInfo& info = info_of(tile, m);
            const Integers dot = sums[m].total(info.start);
            store_panel(tile, m, n, (__builtin_convertvector(dot, Lanes) * scale) * info.scale);
        }
    }
}

#endif

template <int NR, int... Rows>
TileFn pick(int rows, Ints<Rows...>) {
    static constexpr TileFn table[] = {tile<Rows + 1, NR>...};
    return table[rows - 1];
}

constexpr int max_rows(int panels) { return panels == 4 ? 6 : panels == 3 ? 9 : 12; }

TileFn choose_tile(int rows, int panels) {
    switch (panels) {
        case 1: return pick<1>(rows, Count<max_rows(1)>{});
        case 2: return pick<2>(rows, Count<max_rows(2)>{});
        case 3: return pick<3>(rows, Count<max_rows(3)>{});
        default: return pick<4>(rows, Count<max_rows(4)>{});
    }
}

void round_row(const xn_matrix& m, const float* x, uint8_t* row) {
    const Rounding rounding = rounding_of(x, m.num_in);
    int32_t sum = 0;
    for (int64_t k = 0; k < m.padded_in; k += 16)
        sum += to_codes(x + k, std::clamp<int64_t>(m.num_in - k, 0, 16), rounding, row + k);
    const ChannelInfo info{rounding.scale, -m.zero * sum};
    memcpy(row + m.padded_in, &info, sizeof info);
}

}  // namespace

const ClassKernels kW8A8 = {
    [](const xn_matrix& m) { return m.padded_in + static_cast<int64_t>(sizeof(ChannelInfo)); },
    round_row,
    [](int panels) { return max_rows(panels); },
    choose_tile,
    4 * kUnroll,
    nullptr,
    nullptr,
};

}  // namespace xn
