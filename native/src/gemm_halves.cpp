// Tiles of 8-bit codes in groups of 16 inputs (Q6_K), by the formula of the group classes:
//   acc ← acc + (sum · weight scale) · activation scale      (fused)
//   acc ← acc + min · activation sum                         (fused, if the weight has mins)
// Activations have a scale per 16 as well. With one per 32 the two halves could share the last multiplication,
// but for a third register per output and so a smaller tile; and the finer scale is the more accurate one.
#include "xllm/classes.h"
#include "xllm/dot.h"
#include "xllm/rounding.h"

namespace xn {
namespace {

constexpr int64_t kHalf = 16;
constexpr int64_t kHalfBytes = kHalf * kPanel;  // of codes of a panel

#if defined(__AVX512VNNI__)

template <int MR, int NR>
void tile(const Tile& tile) {
    constexpr int kBases = (MR + 2) / 3;
    const xn_matrix& matrix = *tile.matrix;
    const int64_t stride = tile.x_stride, panel_bytes = matrix.panel_bytes;
    const int64_t scale_row = matrix.scale_row_bytes();
    const bool half = matrix.half_scales, has_mins = matrix.has_mins;
    __m512 acc[MR][NR];
    for_each<MR>([&](auto m) XN_LAMBDA {
        for_each<NR>([&](auto n) XN_LAMBDA { acc[m][n] = _mm512_setzero_ps(); });
    });
    const uint8_t* b[kBases];
    for_each<kBases>([&](auto i) XN_LAMBDA { b[i] = tile.x + 3 * i * stride; });
    const uint8_t* w = tile.w;
    const uint8_t* next = w + tile.prefetch;
    const uint8_t* scales = tile.w + matrix.scales_at;
    const int64_t mins_ahead = matrix.mins_at - matrix.scales_at;
    const uint8_t* info = tile.x + matrix.padded_in;
    const auto info_of = [&](int m) XN_LAMBDA {
        return reinterpret_cast<const GroupInfo*>(info + m * stride);
    };
    for (int64_t group = matrix.padded_in / kHalf; group > 0; --group) {
        keep_apart(next);
        __m512i dot[MR][NR];
        for_each<MR>([&](auto m) XN_LAMBDA {
            const __m512i start = _mm512_set1_epi32(info_of(m)->start);
            for_each<NR>([&](auto n) XN_LAMBDA { dot[m][n] = start; });
        });
        for_each<4>([&](auto q) XN_LAMBDA {
            __m512i lanes[NR];
            for_each<NR>([&](auto n) XN_LAMBDA {
                lanes[n] = _mm512_load_si512(w + n * panel_bytes + 64 * q);
                _mm_prefetch(next + n * panel_bytes + 64 * q, _MM_HINT_T1);
            });
            for_each<MR>([&](auto m) XN_LAMBDA {
                multiply_codes<m % 3, 4 * q, NR>(b[m / 3], stride, lanes, dot[m]);
            });
        });
        for_each<NR>([&](auto n) XN_LAMBDA {
            const __m512 scale = scales_at(scales + n * panel_bytes, half);
            for_each<MR>([&](auto m) XN_LAMBDA {
                const __m512 part = _mm512_mul_ps(_mm512_cvtepi32_ps(dot[m][n]), scale);
                acc[m][n] = _mm512_fmadd_ps(part, _mm512_set1_ps(info_of(m)->scale), acc[m][n]);
            });
        });
        if (has_mins)
            for_each<NR>([&](auto n) XN_LAMBDA {
                const __m512 min = scales_at(scales + n * panel_bytes + mins_ahead, half);
                for_each<MR>([&](auto m) XN_LAMBDA {
                    acc[m][n] = _mm512_fmadd_ps(min, _mm512_set1_ps(info_of(m)->sum), acc[m][n]);
                });
            });
        w += kHalfBytes;
        next += kHalfBytes;
        scales += scale_row;
        info += sizeof(GroupInfo);
        for_each<kBases>([&](auto i) XN_LAMBDA { b[i] += kHalf; });
    }
    for_each<MR>([&](auto m) XN_LAMBDA { store_row<NR>(tile, m, acc[m]); });
}

#else

template <int MR, int NR>
void tile(const Tile& tile) {
    const xn_matrix& matrix = *tile.matrix;
    const bool half = matrix.half_scales;
    for (int n = 0; n < NR; ++n) {
        Lanes acc[MR] = {};
        const uint8_t* panel = tile.w + n * matrix.panel_bytes;
        for (int64_t g = 0; g < matrix.padded_in / kHalf; ++g) {
            Step steps[4];
            for (int q = 0; q < 4; ++q) steps[q].load(panel + g * kHalfBytes + 64 * q);
            const uint8_t* at = panel + matrix.scales_at + g * matrix.scale_row_bytes();
            const Lanes scale = scales_at(at, half);
            Lanes min{};
            if (matrix.has_mins) min = scales_at(at + matrix.mins_at - matrix.scales_at, half);
            for (int m = 0; m < MR; ++m) {
                const uint8_t* row = tile.x + m * tile.x_stride;
                const GroupInfo& info = reinterpret_cast<const GroupInfo*>(row + matrix.padded_in)[g];
                PairSums sums;
                sums.clear();
                for (int q = 0; q < 4; ++q) add_products(steps[q], row + g * kHalf + 4 * q, sums);
                const Integers dot = sums.total(info.start);
                acc[m] = multiply_add(__builtin_convertvector(dot, Lanes) * scale, info.scale, acc[m]);
                if (matrix.has_mins) acc[m] = multiply_add(min, info.sum, acc[m]);
            }
        }
        for (int m = 0; m < MR; ++m) store_panel(tile, m, n, acc[m]);
    }
}

#endif

template <int NR, int... Rows>
TileFn pick(int rows, Ints<Rows...>) {
    static constexpr TileFn table[] = {tile<Rows + 1, NR>...};
    return table[rows - 1];
}

}  // namespace

TileFn halves_tile(int rows, int panels) {
    switch (panels) {
        case 1: return pick<1>(rows, Count<max_group_rows(1)>{});
        case 2: return pick<2>(rows, Count<max_group_rows(2)>{});
        case 3: return pick<3>(rows, Count<max_group_rows(3)>{});
        default: return pick<4>(rows, Count<max_group_rows(4)>{});
    }
}

void to_halves_row(const float* x, int64_t num_in, int64_t padded_in, int32_t zero, uint8_t* row) {
    GroupInfo* info = reinterpret_cast<GroupInfo*>(row + padded_in);
    for (int64_t g = 0; g < padded_in / kHalf; ++g) {
        const float* from = x + g * kHalf;
        const int64_t count = std::clamp<int64_t>(num_in - g * kHalf, 0, kHalf);
        const Rounding rounding = rounding_of(from, count);
        const int32_t sum = to_codes(from, count, rounding, row + g * kHalf);
        info[g] = GroupInfo{rounding.scale, -zero * sum, rounding.scale * static_cast<float>(sum), 0.0f};
    }
}

}  // namespace xn
