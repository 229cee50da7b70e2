// Tiles of 8-bit codes in groups of 16 inputs (Q6_K), by the formula of the group classes:
//   acc ← acc + (sum · weight scale) · activation scale      (fused)
//   acc ← acc + min · activation sum                         (fused, if the weight has mins)
// Activations have a scale per 16 as well. With one per 32 the two halves could share the last multiplication,
// but for a third register per output and so a smaller tile; and the finer scale is the more accurate one.
#include "xllm/dot.h"
#include "xllm/rounding.h"

namespace xn {
namespace {

constexpr int64_t kHalf = 16;
// A row is K codes, then K/16 of these.
struct HalfInfo {
    float scale;
    int32_t start;  // −128 · Σ codes: what the integer accumulator of the group begins with
    float sum;      // scale · Σ codes, what the weight's min is multiplied by
    float unused;
};

constexpr int64_t kHalfBytes = kHalf * kPanel;  // of codes of a panel

#if defined(__AVX512VNNI__)

template <int MR, int NR>
void tile(const Tile& tile) {
    constexpr int kBases = (MR + 2) / 3;
    const xn_matrix& matrix = *tile.matrix;
    const int64_t stride = tile.x_stride, w_stride = tile.w_stride, bytes = tile.ahead_bytes;
    const bool half = tile.half;
    const int64_t scale_row = kPanel * (half ? 2 : 4);
    __m512 acc[MR][NR];
    for_each<MR>([&](auto m) XN_LAMBDA {
        for_each<NR>([&](auto n) XN_LAMBDA { acc[m][n] = _mm512_setzero_ps(); });
    });
    const uint8_t *b[kBases], *infos[kBases];
    for_each<kBases>([&](auto i) XN_LAMBDA {
        b[i] = tile.x + 3 * i * stride;
        infos[i] = b[i] + matrix.padded_in;
    });
    const auto info_of = [&](auto m) XN_LAMBDA {
        return reinterpret_cast<const HalfInfo*>(infos[m / 3] + m % 3 * stride);
    };
    const uint8_t *w = tile.w, *ahead = tile.ahead, *scales = tile.scales, *mins = tile.mins;
    for (int64_t group = matrix.num_scales(); group > 0; --group) {
        draw(ahead, bytes);
        __m512i dot[MR][NR];
        for_each<MR>([&](auto m) XN_LAMBDA {
            const __m512i start = _mm512_set1_epi32(info_of(m)->start);
            for_each<NR>([&](auto n) XN_LAMBDA { dot[m][n] = start; });
        });
        for_each<4>([&](auto q) XN_LAMBDA {
            __m512i lanes[NR];
            for_each<NR>([&](auto n) XN_LAMBDA {
                lanes[n] = _mm512_load_si512(w + n * w_stride + 64 * q);
            });
            for_each<MR>([&](auto m) XN_LAMBDA {
                multiply_codes<NR>(broadcast<m % 3, 4 * q>(b[m / 3], stride), lanes, dot[m]);
            });
        });
        for_each<NR>([&](auto n) XN_LAMBDA {
            const __m512 scale = scales_at(scales + n * w_stride, half);
            for_each<MR>([&](auto m) XN_LAMBDA {
                const __m512 part = _mm512_mul_ps(_mm512_cvtepi32_ps(dot[m][n]), scale);
                acc[m][n] = _mm512_fmadd_ps(part, _mm512_set1_ps(info_of(m)->scale), acc[m][n]);
            });
        });
        if (mins != nullptr) {
            for_each<NR>([&](auto n) XN_LAMBDA {
                const __m512 min = scales_at(mins + n * w_stride, half);
                for_each<MR>([&](auto m) XN_LAMBDA {
                    acc[m][n] = _mm512_fmadd_ps(min, _mm512_set1_ps(info_of(m)->sum), acc[m][n]);
                });
            });
            mins += scale_row;
        }
        w += kHalfBytes;
        scales += scale_row;
        for_each<kBases>([&](auto i) XN_LAMBDA {
            b[i] += kHalf;
            infos[i] += sizeof(HalfInfo);
        });
    }
    for_each<MR>([&](auto m) XN_LAMBDA { store_row<NR>(tile, m, acc[m]); });
}

#else

template <int MR, int NR>
void tile(const Tile& tile) {
    const xn_matrix& matrix = *tile.matrix;
    const int64_t scale_row = matrix.scale_row_bytes();
    for (int n = 0; n < NR; ++n) {
        Lanes acc[MR] = {};
        const uint8_t* panel = tile.w + n * tile.w_stride;
        for (int64_t g = 0; g < matrix.padded_in / kHalf; ++g) {
            Step steps[4];
            for (int q = 0; q < 4; ++q) steps[q].load(panel + g * kHalfBytes + 64 * q);
            const int64_t at = n * tile.w_stride + g * scale_row;
            const Lanes scale = scales_at(tile.scales + at, tile.half);
            Lanes min{};
            if (tile.mins != nullptr) min = scales_at(tile.mins + at, tile.half);
            for (int m = 0; m < MR; ++m) {
                const uint8_t* row = tile.x + m * tile.x_stride;
                const HalfInfo& info = reinterpret_cast<const HalfInfo*>(row + matrix.padded_in)[g];
                PairSums sums;
                sums.clear();
                for (int q = 0; q < 4; ++q) add_products(steps[q], row + g * kHalf + 4 * q, sums);
                const Integers dot = sums.total(info.start);
                acc[m] = multiply_add(__builtin_convertvector(dot, Lanes) * scale, info.scale, acc[m]);
                if (tile.mins != nullptr) acc[m] = multiply_add(min, info.sum, acc[m]);
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

constexpr int max_rows(int panels) { return panels == 4 ? 2 : panels == 3 ? 4 : 6; }

TileFn choose_tile(int rows, int panels) {
    switch (panels) {
        case 1: return pick<1>(rows, Count<max_rows(1)>{});
        case 2: return pick<2>(rows, Count<max_rows(2)>{});
        case 3: return pick<3>(rows, Count<max_rows(3)>{});
        default: return pick<4>(rows, Count<max_rows(4)>{});
    }
}

int64_t row_bytes(const xn_matrix& m) {
    return m.padded_in + m.num_scales() * static_cast<int64_t>(sizeof(HalfInfo));
}

void round_row(const xn_matrix& m, const float* x, uint8_t* row) {
    auto* info = reinterpret_cast<HalfInfo*>(row + m.padded_in);
    for (int64_t g = 0; g < m.num_scales(); ++g) {
        const float* from = x + g * kHalf;
        const int64_t count = std::clamp<int64_t>(m.num_in - g * kHalf, 0, kHalf);
        const Rounding rounding = rounding_of(from, count);
        const int32_t sum = to_codes(from, count, rounding, row + g * kHalf);
        info[g] = HalfInfo{rounding.scale, -m.zero * sum, rounding.scale * static_cast<float>(sum), 0.0f};
    }
}

}  // namespace

const ClassKernels kW8G16 = {
    row_bytes, round_row, [](int panels) { return max_rows(panels); }, choose_tile, kHalf, nullptr, nullptr,
};

}  // namespace xn
