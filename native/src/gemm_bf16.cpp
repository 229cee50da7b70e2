// bf16 tiles: rows × 16-channel panels, float32 accumulators, two inputs per step.
// Rows are addressed from every third one (b, b + s, b + 2s) to stay within 16 registers.
#include "xllm/tile.h"

namespace xn {
namespace {

#if defined(__AVX512BF16__)

constexpr int kUnroll = 4;  // steps of two inputs; K is a multiple of 32

template <int NR>
XN_INLINE void multiply(__m512i x, const __m512i* w, __m512* acc) {
    for_each<NR>([&](auto n) XN_LAMBDA {
        asm volatile("vdpbf16ps %[x], %[w], %[a]" : [a] "+v"(acc[n]) : [x] "v"(x), [w] "v"(w[n]));
    });
}

template <int MR, int NR>
void tile(const Tile& tile) {
    constexpr int kBases = (MR + 2) / 3;
    const int64_t stride = tile.x_stride, w_stride = tile.w_stride, bytes = tile.ahead_bytes;
    __m512 acc[MR][NR];
    for_each<MR>([&](auto m) XN_LAMBDA {
        for_each<NR>([&](auto n) XN_LAMBDA { acc[m][n] = _mm512_setzero_ps(); });
    });
    const uint8_t* b[kBases];
    for_each<kBases>([&](auto i) XN_LAMBDA { b[i] = tile.x + 3 * i * stride; });
    const uint8_t* w = tile.w;
    const uint8_t* ahead = tile.ahead;
    for (int64_t k = tile.matrix->padded_in / (2 * kUnroll); k > 0; --k) {
        for_each<kUnroll>([&](auto u) XN_LAMBDA {
            __m512i lanes[NR];
            draw(ahead, bytes);
            for_each<NR>([&](auto n) XN_LAMBDA {
                lanes[n] = _mm512_load_si512(w + n * w_stride + 64 * u);
            });
            for_each<MR>([&](auto m) XN_LAMBDA {
                multiply<NR>(broadcast<m % 3, 4 * u>(b[m / 3], stride), lanes, acc[m]);
            });
        });
        w += 64 * kUnroll;
        for_each<kBases>([&](auto i) XN_LAMBDA { b[i] += 4 * kUnroll; });
    }
    for_each<MR>([&](auto m) XN_LAMBDA { store_row<NR>(tile, m, acc[m]); });
}

constexpr int64_t kValueBytes = 2;  // of a rounded input

constexpr int max_rows(int panels) { return panels == 4 ? 6 : panels == 3 ? 9 : 12; }

#else

constexpr int64_t kValueBytes = 4;  // rounded inputs and unpacked weights are kept as float32

constexpr int max_rows(int) { return 6; }

// acc ← acc + x · w over all inputs, in order.
template <int MR>
void multiply(const uint8_t* x, int64_t stride, const float* w, int64_t count, Lanes* acc) {
#if defined(__AVX2__) && defined(__FMA__)
    __m256 low[MR], high[MR];
    for_each<MR>([&](auto m) XN_LAMBDA { low[m] = high[m] = _mm256_setzero_ps(); });
    for (int64_t k = 0; k < count; ++k) {
        const __m256 first = _mm256_loadu_ps(w + 16 * k), second = _mm256_loadu_ps(w + 16 * k + 8);
        for_each<MR>([&](auto m) XN_LAMBDA {
            const __m256 own = _mm256_broadcast_ss(reinterpret_cast<const float*>(x + m * stride) + k);
            low[m] = _mm256_fmadd_ps(first, own, low[m]);
            high[m] = _mm256_fmadd_ps(second, own, high[m]);
        });
    }
    for_each<MR>([&](auto m) XN_LAMBDA {
        memcpy(&acc[m], &low[m], 32);
        memcpy(reinterpret_cast<char*>(&acc[m]) + 32, &high[m], 32);
    });
#else
    for (int64_t k = 0; k < count; ++k) {
        Lanes v;
        memcpy(&v, w + 16 * k, 64);
        for (int m = 0; m < MR; ++m)
            acc[m] = multiply_add(v, reinterpret_cast<const float*>(x + m * stride)[k], acc[m]);
    }
#endif
}

// Reads panels as `unpack` leaves them: [K][16] float32.
template <int MR, int NR>
void tile(const Tile& tile) {
    for (int n = 0; n < NR; ++n) {
        Lanes acc[MR] = {};
        const auto* w = reinterpret_cast<const float*>(tile.w + n * tile.w_stride);
        multiply<MR>(tile.x, tile.x_stride, w, tile.matrix->padded_in, acc);
        for (int m = 0; m < MR; ++m) store_panel(tile, m, n, acc[m]);
    }
}

int64_t unpacked_bytes(const xn_matrix& m) { return m.padded_in * kPanel * kValueBytes; }

void unpack(const xn_matrix& m, const uint8_t* panel, uint8_t* to) {
    for (int64_t k = 0; k < m.padded_in / 2; ++k, panel += 64, to += 128) {
        Words pairs;
        memcpy(&pairs, panel, 64);
        const Words even = pairs << 16, odd = pairs & 0xffff0000u;
        memcpy(to, &even, 64);
        memcpy(to + 64, &odd, 64);
    }
}

#endif

template <int NR, int... Rows>
TileFn pick(int rows, Ints<Rows...>) {
    static constexpr TileFn table[] = {tile<Rows + 1, NR>...};
    return table[rows - 1];
}

TileFn choose_tile(int rows, int panels) {
    switch (panels) {
        case 1: return pick<1>(rows, Count<max_rows(1)>{});
        case 2: return pick<2>(rows, Count<max_rows(2)>{});
        case 3: return pick<3>(rows, Count<max_rows(3)>{});
        default: return pick<4>(rows, Count<max_rows(4)>{});
    }
}

}  // namespace

const ClassKernels kBf16 = {
    [](const xn_matrix& m) { return m.padded_in * kValueBytes; },
    [](const xn_matrix& m, const float* x, uint8_t* row) { to_bf16_row(x, m.num_in, m.padded_in, row); },
    [](int panels) { return max_rows(panels); },
    choose_tile,
    2,
#if defined(__AVX512BF16__)
    nullptr,
    nullptr,
#else
    unpacked_bytes,
    unpack,
#endif
};

void to_bf16_row(const float* x, int64_t num_in, int64_t padded_in, uint8_t* row) {
    int64_t k = 0;
#if defined(__AVX512BF16__)
    for (; k + 32 <= num_in; k += 32) {
        const __m512bh v = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + k + 16), _mm512_loadu_ps(x + k));
        memcpy(row + 2 * k, &v, 64);
    }
    if (k < num_in) {
        const int64_t rest = num_in - k;
        const __m512bh v = _mm512_cvtne2ps_pbh(load_part(x + k, rest, 1), load_part(x + k, rest, 0));
        memcpy(row + 2 * k, &v, 64);
    }
#else
    for (; k < padded_in; ++k) {
        const float value = k < num_in ? bf16_value(bf16_bits(x[k])) : 0.0f;
        memcpy(row + kValueBytes * k, &value, 4);
    }
#endif
    (void)padded_in;
}

}  // namespace xn
