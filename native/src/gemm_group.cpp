// Tiles of the group classes: 8-bit activations × 8- or 4-bit codes, integer sums within a group of 32
// inputs, one float32 update per group. The integer sum is exact, so only the update's formula must be one:
//   acc ← acc + (sum · weight scale) · activation scale      (fused)
//   acc ← acc + min · activation sum                         (fused, if the weight has mins)
#include "xllm/tile.h"

namespace xn {
namespace {

#if defined(__AVX512VNNI__)

template <int NR>
XN_INLINE void multiply(__m512i x, const __m512i* w, __m512i* acc) {
    for_each<NR>([&](auto n) XN_LAMBDA {
        asm volatile("vpdpbusd %[x], %[w], %[a]" : [a] "+v"(acc[n]) : [x] "v"(x), [w] "v"(w[n]));
    });
}

XN_INLINE __m512 load_scales(const uint8_t* at, bool half) {
    return half ? _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)))
                : _mm512_loadu_ps(reinterpret_cast<const float*>(at));
}

XN_INLINE void split(__m512i both, __m512i& low, __m512i& high) {
    const __m512i nibble = _mm512_set1_epi8(15);
    low = _mm512_and_si512(both, nibble);
    high = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
}

constexpr int max_rows(int panels) { return panels == 4 ? 2 : panels == 3 ? 4 : 6; }

template <int MR, int NR, bool Four>
void tile(const Tile& tile) {
    constexpr int kBases = (MR + 2) / 3;
    const xn_matrix& matrix = *tile.matrix;
    const int64_t stride = tile.x_stride, w_stride = tile.w_stride, bytes = tile.ahead_bytes;
    const bool half = tile.half;
    const int64_t scale_row = kPanel * (half ? 2 : 4);
    const int64_t start_at = matrix.zero == 128  ? offsetof(GroupInfo, start128)
                             : matrix.zero == 8 ? offsetof(GroupInfo, start8)
                                                : 0;
    __m512 acc[MR][NR];
    for_each<MR>([&](auto m) XN_LAMBDA {
        for_each<NR>([&](auto n) XN_LAMBDA { acc[m][n] = _mm512_setzero_ps(); });
    });
    const uint8_t *b[kBases], *infos[kBases];
    for_each<kBases>([&](auto i) XN_LAMBDA {
        b[i] = tile.x + 3 * i * stride;
        infos[i] = b[i] + matrix.padded_in;
    });
    const auto info = [&](auto m, int64_t field) XN_LAMBDA {
        return infos[m / 3] + m % 3 * stride + field;
    };
    const auto info_float = [&](auto m, int64_t field) XN_LAMBDA {
        return _mm512_set1_ps(*reinterpret_cast<const float*>(info(m, field)));
    };
    const uint8_t *w = tile.w, *ahead = tile.ahead, *scales = tile.scales, *mins = tile.mins;
    for (int64_t group = matrix.num_groups(); group > 0; --group) {
        draw(ahead, bytes);
        __m512i dot[MR][NR];
        if (start_at != 0)
            for_each<MR>([&](auto m) XN_LAMBDA {
                const __m512i start = _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(info(m, start_at)));
                for_each<NR>([&](auto n) XN_LAMBDA { dot[m][n] = start; });
            });
        else
            for_each<MR>([&](auto m) XN_LAMBDA {
                for_each<NR>([&](auto n) XN_LAMBDA { dot[m][n] = _mm512_setzero_si512(); });
            });
        if constexpr (Four) {
            for_each<4>([&](auto q) XN_LAMBDA {
                __m512i low[NR], high[NR];
                for_each<NR>([&](auto n) XN_LAMBDA {
                    split(_mm512_load_si512(w + n * w_stride + 64 * q), low[n], high[n]);
                });
                for_each<MR>([&](auto m) XN_LAMBDA {
                    multiply<NR>(broadcast<m % 3, 4 * q>(b[m / 3], stride), low, dot[m]);
                });
                for_each<MR>([&](auto m) XN_LAMBDA {
                    multiply<NR>(broadcast<m % 3, 16 + 4 * q>(b[m / 3], stride), high, dot[m]);
                });
            });
            w += 256;
        } else {
            for_each<8>([&](auto q) XN_LAMBDA {
                __m512i lanes[NR];
                for_each<NR>([&](auto n) XN_LAMBDA {
                    lanes[n] = _mm512_load_si512(w + n * w_stride + 64 * q);
                });
                for_each<MR>([&](auto m) XN_LAMBDA {
                    multiply<NR>(broadcast<m % 3, 4 * q>(b[m / 3], stride), lanes, dot[m]);
                });
            });
            w += 512;
        }
        __m512 scale[NR];
        for_each<NR>([&](auto n) XN_LAMBDA { scale[n] = load_scales(scales + n * w_stride, half); });
        for_each<MR>([&](auto m) XN_LAMBDA {
            const __m512 own = info_float(m, offsetof(GroupInfo, scale));
            for_each<NR>([&](auto n) XN_LAMBDA {
                const __m512 part = _mm512_mul_ps(_mm512_cvtepi32_ps(dot[m][n]), scale[n]);
                acc[m][n] = _mm512_fmadd_ps(part, own, acc[m][n]);
            });
        });
        if (mins != nullptr) {
            __m512 min[NR];
            for_each<NR>([&](auto n) XN_LAMBDA { min[n] = load_scales(mins + n * w_stride, half); });
            for_each<MR>([&](auto m) XN_LAMBDA {
                const __m512 sum = info_float(m, offsetof(GroupInfo, sum));
                for_each<NR>([&](auto n) XN_LAMBDA { acc[m][n] = _mm512_fmadd_ps(min[n], sum, acc[m][n]); });
            });
            mins += scale_row;
        }
        scales += scale_row;
        for_each<kBases>([&](auto i) XN_LAMBDA {
            b[i] += XN_GROUP;
            infos[i] += sizeof(GroupInfo);
        });
    }
    for_each<MR>([&](auto m) XN_LAMBDA { store_row<NR>(tile, m, acc[m]); });
}

#else

constexpr int max_rows(int) { return 4; }

void unpack_scales(const uint8_t* from, bool half, uint8_t* to) {
    if (!half) {
        memcpy(to, from, 64);
        return;
    }
#if defined(__F16C__)
    for (int half8 = 0; half8 < 2; ++half8) {
        const auto* at = reinterpret_cast<const __m128i*>(from) + half8;
        _mm256_storeu_ps(reinterpret_cast<float*>(to) + 8 * half8, _mm256_cvtph_ps(_mm_loadu_si128(at)));
    }
#else
    for (int i = 0; i < 16; ++i) {
        uint16_t bits;
        memcpy(&bits, from + 2 * i, 2);
        const float value = half_value(bits);
        memcpy(to + 4 * i, &value, 4);
    }
#endif
}

// The 32 codes of a group for 16 channels as signed words: [k/2][channel][2].
template <bool Four>
void unpack_group(const uint8_t* from, uint8_t* to) {
    const auto put = [to](int q, Words quads) {
        const Words first = (quads & 0xffu) | (quads & 0xff00u) << 8;
        const Words second = (quads >> 16 & 0xffu) | (quads >> 8 & 0xff0000u);
        memcpy(to + 128 * q, &first, 64);
        memcpy(to + 128 * q + 64, &second, 64);
    };
    for (int q = 0; q < (Four ? 4 : 8); ++q) {
        Words bytes;
        memcpy(&bytes, from + 64 * q, 64);
        if (!Four) {
            put(q, bytes);
            continue;
        }
        put(q, bytes & 0x0f0f0f0fu);
        put(q + 4, bytes >> 4 & 0x0f0f0f0fu);
    }
}

// Σ over a group of codes of MR rows × a panel's, added to `dot`.
template <int MR>
void add_group(const uint8_t* const* rows, const int16_t* wide, Integers* dot) {
#if defined(__AVX2__)
    __m256i low[MR], high[MR];
    for_each<MR>([&](auto m) XN_LAMBDA {
        memcpy(&low[m], &dot[m], 32);
        memcpy(&high[m], reinterpret_cast<const char*>(&dot[m]) + 32, 32);
    });
    for (int k = 0; k < 16; ++k) {
        const __m256i* w = reinterpret_cast<const __m256i*>(wide + 32 * k);
        const __m256i first = _mm256_loadu_si256(w), second = _mm256_loadu_si256(w + 1);
        for_each<MR>([&](auto m) XN_LAMBDA {
            int32_t pair;
            memcpy(&pair, rows[m] + 4 * k, 4);
            const __m256i both = _mm256_set1_epi32(pair);
            low[m] = _mm256_add_epi32(low[m], _mm256_madd_epi16(first, both));
            high[m] = _mm256_add_epi32(high[m], _mm256_madd_epi16(second, both));
        });
    }
    for_each<MR>([&](auto m) XN_LAMBDA {
        memcpy(&dot[m], &low[m], 32);
        memcpy(reinterpret_cast<char*>(&dot[m]) + 32, &high[m], 32);
    });
#else
    for (int m = 0; m < MR; ++m) {
        int16_t x[XN_GROUP];
        memcpy(x, rows[m], sizeof x);
        for (int k = 0; k < 16; ++k)
            for (int n = 0; n < 16; ++n)
                dot[m][n] += x[2 * k] * wide[32 * k + 2 * n] + x[2 * k + 1] * wide[32 * k + 2 * n + 1];
    }
#endif
}

Lanes lanes_at(const uint8_t* at) {
    Lanes out;
    memcpy(&out, at, 64);
    return out;
}

// Reads panels as `unpack` leaves them.
template <int MR, int NR, bool>
void tile(const Tile& tile) {
    const xn_matrix& matrix = *tile.matrix;
    for (int n = 0; n < NR; ++n) {
        Lanes acc[MR] = {};
        const uint8_t* w = tile.w + n * tile.w_stride;
        for (int64_t g = 0; g < matrix.num_groups(); ++g) {
            const uint8_t* rows[MR];
            const GroupInfo* infos[MR];
            Integers dot[MR];
            for (int m = 0; m < MR; ++m) {
                const uint8_t* row = tile.x + m * tile.x_stride;
                rows[m] = row + g * XN_GROUP * kGroupCodeBytes;
                infos[m] = reinterpret_cast<const GroupInfo*>(row + matrix.padded_in * kGroupCodeBytes) + g;
                dot[m] = Integers{} + infos[m]->start(matrix.zero);
            }
            add_group<MR>(rows, reinterpret_cast<const int16_t*>(w + g * XN_GROUP * kPanel * kGroupCodeBytes), dot);
            const Lanes scale = lanes_at(tile.scales + n * tile.w_stride + g * 64);
            for (int m = 0; m < MR; ++m)
                acc[m] = multiply_add(
                    __builtin_convertvector(dot[m], Lanes) * scale, infos[m]->scale, acc[m]);
            if (tile.mins == nullptr) continue;
            const Lanes min = lanes_at(tile.mins + n * tile.w_stride + g * 64);
            for (int m = 0; m < MR; ++m) acc[m] = multiply_add(min, infos[m]->sum, acc[m]);
        }
        for (int m = 0; m < MR; ++m) store_panel(tile, m, n, acc[m]);
    }
}

// Codes, scales, mins: the order of a panel, with wider codes and float32 scales.
int64_t unpacked_bytes(const xn_matrix& m) {
    return kPanel * (m.padded_in * kGroupCodeBytes + m.num_groups() * 4 * (m.has_mins ? 2 : 1));
}

template <bool Four>
void unpack(const xn_matrix& m, const uint8_t* panel, uint8_t* to) {
    constexpr int64_t kStep = XN_GROUP * kPanel;
    uint8_t* scales = to + m.num_groups() * kStep * kGroupCodeBytes;
    uint8_t* mins = scales + m.num_groups() * 64;
    for (int64_t g = 0; g < m.num_groups(); ++g) {
        unpack_group<Four>(panel + g * (Four ? kStep / 2 : kStep), to + g * kStep * kGroupCodeBytes);
        const int64_t at = g * m.scale_row_bytes();
        unpack_scales(panel + m.scales_at + at, m.half_scales, scales + 64 * g);
        if (m.has_mins) unpack_scales(panel + m.mins_at + at, m.half_scales, mins + 64 * g);
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
        case 1: return pick<1, Four>(rows, Count<max_rows(1)>{});
        case 2: return pick<2, Four>(rows, Count<max_rows(2)>{});
        case 3: return pick<3, Four>(rows, Count<max_rows(3)>{});
        default: return pick<4, Four>(rows, Count<max_rows(4)>{});
    }
}

int64_t row_bytes(const xn_matrix& m) {
    return m.padded_in * kGroupCodeBytes + m.num_groups() * static_cast<int64_t>(sizeof(GroupInfo));
}

void round_row(const xn_matrix& m, const float* x, uint8_t* row) {
    to_group_row(x, m.num_in, m.padded_in, row);
}

constexpr ClassKernels kernels(bool four) {
    return {
        row_bytes,
        round_row,
        [](int panels) { return max_rows(panels); },
        four ? pick_panels<true> : pick_panels<false>,
        XN_GROUP,
#if defined(__AVX512VNNI__)
        nullptr,
        nullptr,
#else
        unpacked_bytes,
        four ? unpack<true> : unpack<false>,
#endif
    };
}

}  // namespace

const ClassKernels kW8G32 = kernels(false), kW4G32 = kernels(true);

}  // namespace xn
