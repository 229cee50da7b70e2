// Tiles of the group classes: 8-bit activations × 8- or 4-bit codes, integer sums within a group of 32
// inputs, one float32 update per group. The integer sum is exact, so only the update's formula must be one:
//   acc ← acc + (sum · weight scale) · activation scale      (fused)
//   acc ← acc + min · activation sum                         (fused, if the weight has mins)
#include "xllm/tile.h"

namespace xn {
namespace {

#if defined(__AVX512VNNI__)

template <int Third, int Offset, int NR>
XN_INLINE void multiply(const uint8_t* base, int64_t stride, const __m512i* w, __m512i* acc) {
    __m512i t;
    if constexpr (Third == 0)
        asm volatile("vpbroadcastd %c[o](%[b]), %[t]" : [t] "=v"(t) : [b] "r"(base), [o] "i"(Offset));
    else if constexpr (Third == 1)
        asm volatile("vpbroadcastd %c[o](%[b],%[s]), %[t]"
                     : [t] "=v"(t) : [b] "r"(base), [s] "r"(stride), [o] "i"(Offset));
    else
        asm volatile("vpbroadcastd %c[o](%[b],%[s],2), %[t]"
                     : [t] "=v"(t) : [b] "r"(base), [s] "r"(stride), [o] "i"(Offset));
    for_each<NR>([&](auto n) XN_LAMBDA {
        asm volatile("vpdpbusd %[t], %[w], %[a]" : [a] "+v"(acc[n]) : [t] "v"(t), [w] "v"(w[n]));
    });
}

XN_INLINE __m512 load_scales(const uint8_t* at, bool half) {
    return half ? _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)))
                : _mm512_loadu_ps(reinterpret_cast<const float*>(at));
}

template <int MR, int NR, bool Four>
void tile(const Tile& tile) {
    constexpr int kBases = (MR + 2) / 3;
    const xn_matrix& matrix = *tile.matrix;
    const int64_t stride = tile.x_stride, panel_bytes = matrix.panel_bytes;
    const int64_t scale_row = matrix.scale_row_bytes();
    const bool half = matrix.half_scales, has_mins = matrix.has_mins;
    const __mmask16 has_zero = matrix.zero == 0 ? 0 : 0xffff;
    const int64_t start_at = matrix.zero == 8 ? offsetof(GroupInfo, start8) : offsetof(GroupInfo, start128);
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
    const GroupInfo* info = reinterpret_cast<const GroupInfo*>(tile.x + matrix.padded_in);
    const auto info_of = [&](int m) XN_LAMBDA {
        return reinterpret_cast<const GroupInfo*>(reinterpret_cast<const uint8_t*>(info) + m * stride);
    };
    for (int64_t group = matrix.num_groups(); group > 0; --group, ++info, scales += scale_row) {
        keep_apart(next);
        __m512i dot[MR][NR];
        for_each<MR>([&](auto m) XN_LAMBDA {
            const __m512i start = _mm512_maskz_set1_epi32(has_zero, *reinterpret_cast<const int32_t*>(
                reinterpret_cast<const uint8_t*>(info_of(m)) + start_at));
            for_each<NR>([&](auto n) XN_LAMBDA { dot[m][n] = start; });
        });
        if constexpr (Four) {
            const __m512i nibble = _mm512_set1_epi8(15);
            for_each<4>([&](auto q) XN_LAMBDA {
                __m512i low[NR], high[NR];
                for_each<NR>([&](auto n) XN_LAMBDA {
                    const uint8_t* at = w + n * panel_bytes + 64 * q;
                    const __m512i both = _mm512_load_si512(at);
                    _mm_prefetch(next + n * panel_bytes + 64 * q, _MM_HINT_T1);
                    low[n] = _mm512_and_si512(both, nibble);
                    high[n] = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
                });
                for_each<MR>([&](auto m) XN_LAMBDA {
                    multiply<m % 3, 4 * q, NR>(b[m / 3], stride, low, dot[m]);
                });
                for_each<MR>([&](auto m) XN_LAMBDA {
                    multiply<m % 3, 16 + 4 * q, NR>(b[m / 3], stride, high, dot[m]);
                });
            });
            w += 256;
            next += 256;
        } else {
            for_each<8>([&](auto q) XN_LAMBDA {
                __m512i lanes[NR];
                for_each<NR>([&](auto n) XN_LAMBDA {
                    const uint8_t* at = w + n * panel_bytes + 64 * q;
                    lanes[n] = _mm512_load_si512(at);
                    _mm_prefetch(next + n * panel_bytes + 64 * q, _MM_HINT_T1);
                });
                for_each<MR>([&](auto m) XN_LAMBDA {
                    multiply<m % 3, 4 * q, NR>(b[m / 3], stride, lanes, dot[m]);
                });
            });
            w += 512;
            next += 512;
        }
        for_each<kBases>([&](auto i) XN_LAMBDA { b[i] += XN_GROUP; });
        for_each<NR>([&](auto n) XN_LAMBDA {
            const __m512 scale = load_scales(scales + n * panel_bytes, half);
            for_each<MR>([&](auto m) XN_LAMBDA {
                const __m512 part = _mm512_mul_ps(_mm512_cvtepi32_ps(dot[m][n]), scale);
                acc[m][n] = _mm512_fmadd_ps(part, _mm512_set1_ps(info_of(m)->scale), acc[m][n]);
            });
        });
        if (has_mins)
            for_each<NR>([&](auto n) XN_LAMBDA {
                const __m512 min = load_scales(scales + n * panel_bytes + mins_ahead, half);
                for_each<MR>([&](auto m) XN_LAMBDA {
                    acc[m][n] = _mm512_fmadd_ps(min, _mm512_set1_ps(info_of(m)->sum), acc[m][n]);
                });
            });
    }
    for_each<MR>([&](auto m) XN_LAMBDA { store_row<NR>(tile, m, acc[m]); });
}

#else

Lanes load_scales(const uint8_t* at, bool half) {
    Lanes out;
    if (!half) {
        memcpy(&out, at, 64);
        return out;
    }
    for (int i = 0; i < 16; ++i) {
        uint16_t bits;
        memcpy(&bits, at + 2 * i, 2);
        out[i] = half_value(bits);
    }
    return out;
}

// The 32 codes of a group for 16 channels as signed words: [k/2][channel][2].
template <bool Four>
void widen(const uint8_t* w, int16_t* wide) {
    for (int q = 0; q < 8; ++q)
        for (int n = 0; n < 16; ++n)
            for (int i = 0; i < 4; ++i) {
                const uint8_t byte = Four ? w[64 * (q % 4) + 4 * n + i] : w[64 * q + 4 * n + i];
                const int code = !Four ? byte : q < 4 ? byte & 15 : byte >> 4;
                wide[((2 * q + i / 2) * 16 + n) * 2 + i % 2] = static_cast<int16_t>(code);
            }
}

Integers group_sums(const int8_t* x, const int16_t* wide, int32_t start) {
    int32_t sums[16];
    for (int n = 0; n < 16; ++n) sums[n] = start;
#if defined(__AVX2__)
    __m256i low = _mm256_set1_epi32(start), high = low;
    for (int k = 0; k < 16; ++k) {
        const uint32_t pair = static_cast<uint16_t>(int16_t{x[2 * k]}) |
                              uint32_t{static_cast<uint16_t>(int16_t{x[2 * k + 1]})} << 16;
        const __m256i both = _mm256_set1_epi32(static_cast<int32_t>(pair));
        const __m256i* w = reinterpret_cast<const __m256i*>(wide + 32 * k);
        low = _mm256_add_epi32(low, _mm256_madd_epi16(_mm256_loadu_si256(w), both));
        high = _mm256_add_epi32(high, _mm256_madd_epi16(_mm256_loadu_si256(w + 1), both));
    }
    memcpy(sums, &low, 32);
    memcpy(sums + 8, &high, 32);
#else
    for (int k = 0; k < 16; ++k)
        for (int n = 0; n < 16; ++n)
            sums[n] += x[2 * k] * wide[32 * k + 2 * n] + x[2 * k + 1] * wide[32 * k + 2 * n + 1];
#endif
    Integers out;
    memcpy(&out, sums, 64);
    return out;
}

template <int MR, int NR, bool Four>
void tile(const Tile& tile) {
    const xn_matrix& matrix = *tile.matrix;
    for (int n = 0; n < NR; ++n) {
        Lanes acc[MR] = {};
        const uint8_t* panel = tile.w + n * matrix.panel_bytes;
        for (int64_t g = 0; g < matrix.num_groups(); ++g) {
            alignas(64) int16_t wide[XN_GROUP * 16];
            widen<Four>(panel + g * (Four ? 256 : 512), wide);
            const uint8_t* at = panel + matrix.scales_at + g * matrix.scale_row_bytes();
            const Lanes scale = load_scales(at, matrix.half_scales);
            Lanes min{};
            if (matrix.has_mins) min = load_scales(at + matrix.mins_at - matrix.scales_at, matrix.half_scales);
            for (int m = 0; m < MR; ++m) {
                const uint8_t* row = tile.x + m * tile.x_stride;
                const GroupInfo& info = reinterpret_cast<const GroupInfo*>(row + matrix.padded_in)[g];
                const auto* codes = reinterpret_cast<const int8_t*>(row) + g * XN_GROUP;
                const Integers dot = group_sums(codes, wide, info.start(matrix.zero));
                acc[m] = multiply_add(__builtin_convertvector(dot, Lanes) * scale, info.scale, acc[m]);
                if (matrix.has_mins) acc[m] = multiply_add(min, info.sum, acc[m]);
            }
        }
        for (int m = 0; m < MR; ++m) store_panel(tile, m, n, acc[m]);
    }
}

#endif

template <int NR, bool Four, int... Rows>
TileFn pick(int rows, Ints<Rows...>) {
    static constexpr TileFn table[] = {tile<Rows + 1, NR, Four>...};
    return table[rows - 1];
}

template <bool Four>
TileFn pick_panels(int rows, int panels) {
    switch (panels) {
        case 1: return pick<1, Four>(rows, Count<max_group_rows(1)>{});
        case 2: return pick<2, Four>(rows, Count<max_group_rows(2)>{});
        case 3: return pick<3, Four>(rows, Count<max_group_rows(3)>{});
        default: return pick<4, Four>(rows, Count<max_group_rows(4)>{});
    }
}

}  // namespace

TileFn group_tile(int rows, int panels, bool four_bits) {
    return four_bits ? pick_panels<true>(rows, panels) : pick_panels<false>(rows, panels);
}

}  // namespace xn
