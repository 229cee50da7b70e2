// What this machine can do at most, for benchmarks to divide by: multiplications from registers alone, and
// plain reads of memory. What must not live here: clocks, and anything a model's step calls.
#include <atomic>

#include "xllm/pack.h"
#include "xllm/threads.h"

namespace xn {
namespace {

#if defined(__AVX2__) && defined(__FMA__)

// 96 times the instruction, on as many accumulators as there are registers for: fewer do not hide the latency.
// They begin at zero, because some CPUs are slower on denormal leftovers.
#define XN_ZERO(i) "vpxor %%xmm" #i ", %%xmm" #i ", %%xmm" #i "\n"
#define XN_ZEROS                                                                                     \
    XN_ZERO(0) XN_ZERO(1) XN_ZERO(2) XN_ZERO(3) XN_ZERO(4) XN_ZERO(5) XN_ZERO(6) XN_ZERO(7) XN_ZERO(8) \
    XN_ZERO(9) XN_ZERO(10) XN_ZERO(11) XN_ZERO(14) XN_ZERO(15)
#define XN_ONE(op, r, i) op " %%" r "14, %%" r "15, %%" r #i "\n"
#define XN_TWELVE(op, r)                                                                    \
    XN_ONE(op, r, 0) XN_ONE(op, r, 1) XN_ONE(op, r, 2) XN_ONE(op, r, 3) XN_ONE(op, r, 4)      \
    XN_ONE(op, r, 5) XN_ONE(op, r, 6) XN_ONE(op, r, 7) XN_ONE(op, r, 8) XN_ONE(op, r, 9)      \
    XN_ONE(op, r, 10) XN_ONE(op, r, 11)
#define XN_LOW                                                                                       \
    "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", \
        "xmm14", "xmm15"
#if defined(__AVX512F__)
#define XN_HIGH_ZERO(i) "vpxord %%zmm" #i ", %%zmm" #i ", %%zmm" #i "\n"
#define XN_MULTIPLY(op)                                                                                 \
    asm volatile(                                                                                       \
        XN_ZEROS XN_HIGH_ZERO(16) XN_HIGH_ZERO(17) XN_HIGH_ZERO(18) XN_HIGH_ZERO(19) XN_HIGH_ZERO(20)     \
            XN_HIGH_ZERO(21) XN_HIGH_ZERO(22) XN_HIGH_ZERO(23) XN_HIGH_ZERO(24) XN_HIGH_ZERO(25)          \
                XN_HIGH_ZERO(26) XN_HIGH_ZERO(27) ".rept 4\n" XN_TWELVE(op, "zmm") XN_ONE(op, "zmm", 16)  \
                    XN_ONE(op, "zmm", 17) XN_ONE(op, "zmm", 18) XN_ONE(op, "zmm", 19)                     \
                        XN_ONE(op, "zmm", 20) XN_ONE(op, "zmm", 21) XN_ONE(op, "zmm", 22)                 \
                            XN_ONE(op, "zmm", 23) XN_ONE(op, "zmm", 24) XN_ONE(op, "zmm", 25)             \
                                XN_ONE(op, "zmm", 26) XN_ONE(op, "zmm", 27) ".endr\n" ::                  \
            : XN_LOW, "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24",  \
              "xmm25", "xmm26", "xmm27")
#else
#define XN_MULTIPLY(op) asm volatile(XN_ZEROS ".rept 8\n" XN_TWELVE(op, "ymm") ".endr\n" ::: XN_LOW)
#endif

#endif

// Operations (two a multiplication) of one round of the class's instruction.
int64_t multiply_round(int32_t weight_class) {
#if defined(__AVX512BF16__)
    if (weight_class == XN_BF16) XN_MULTIPLY("vdpbf16ps");
    else XN_MULTIPLY("vpdpbusd");
    return 96 * (weight_class == XN_BF16 ? 64 : 128);
#elif defined(__AVX2__) && defined(__FMA__)
    if (weight_class == XN_BF16) XN_MULTIPLY("vfmadd231ps");
    else XN_MULTIPLY("vpmaddwd");
    return 96 * (weight_class == XN_BF16 ? 16 : 32);
#else
    (void)weight_class;
    return 0;
#endif
}

typedef uint64_t Line __attribute__((vector_size(64)));

}  // namespace
}  // namespace xn

extern "C" {

int64_t xn_multiply(int32_t weight_class, int64_t rounds) {
    int64_t operations = 0;
    for (int64_t i = 0; i < rounds; ++i) operations += xn::multiply_round(weight_class);
    return operations;
}

int64_t xn_read_memory(xn_pool* pool, const uint8_t* from, int64_t bytes) {
    constexpr int64_t kPiece = 1 << 20;
    std::atomic<uint64_t> seen{0};
    xn::parallel(pool, (bytes + kPiece - 1) / kPiece, [&](int64_t item, int32_t) {
        xn::Line sums[4] = {};
        const int64_t end = bytes < (item + 1) * kPiece ? bytes : (item + 1) * kPiece;
        for (int64_t at = item * kPiece; at + 256 <= end; at += 256)
            for (int part = 0; part < 4; ++part) {
                xn::Line line;
                memcpy(&line, from + at + 64 * part, 64);
                sums[part] ^= line;
            }
        const xn::Line all = sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
        for (int i = 0; i < 8; ++i) seen.fetch_xor(all[i]);
    });
    return static_cast<int64_t>(seen.load());
}

}  // extern "C"
