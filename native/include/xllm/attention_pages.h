// Where a step's K and V stand in the pages, how they are written, and how codes become bf16 again.
// What must not live here: scores, threads.
#ifndef XLLM_ATTENTION_PAGES_H
#define XLLM_ATTENTION_PAGES_H

#include <algorithm>

#include "xllm/attention_product.h"

namespace xn::attention {

constexpr int64_t kMaxHead = 512;  // largest head size

struct Call {
    const xn_attention_plan* plan;
    uint8_t* pages;
    int64_t layer;
    const float *q, *k, *v;
    int64_t ldq, ldk, ldv;
    float scale, softcap;
    float factor;  // what scores are multiplied by before they become powers of two
    float* y;
    int64_t ldy;
    int64_t stride;  // items run at once: how far ahead this thread's next item is
    bool failed;

    bool coded() const { return plan->kv_class == XN_KV_INT8; }
    uint8_t* bytes(int64_t page, int64_t which, int64_t kv_head) const {
        const int64_t index = ((page * 2 + which) * plan->num_layers + layer) * plan->num_kv_heads + kv_head;
        return pages + index * kPage * (coded() ? plan->head_dim + 4 : 2 * plan->head_dim);
    }
    uint16_t* tile(int64_t page, int64_t which, int64_t kv_head) const {
        return reinterpret_cast<uint16_t*>(bytes(page, which, kv_head));
    }
    // Behind the codes of a tile stand its positions' scales.
    float* scales(int64_t page, int64_t which, int64_t kv_head) const {
        return reinterpret_cast<float*>(bytes(page, which, kv_head) + kPage * plan->head_dim);
    }
};

// The first block that row `first` of a span sees anything of.
inline int64_t first_block(const xn_attention_plan& plan, const xn_span& span, int64_t first) {
    return plan.window > 0 ? std::max<int64_t>(0, span.start + first - plan.window + 1) / kPage : 0;
}

// Where a block stands. Those of a span in a space follow each other: nothing is looked up.
inline int64_t page_of(const xn_attention_plan& plan, const xn_span& span, int64_t block) {
    return span.base >= 0 ? span.base + block : plan.page_table[span.first_page + block];
}

inline void round_row(const float* from, int64_t size, uint16_t* to) {
    for (int64_t d = 0; d < size; d += kLanes) store_bf16(to + d, load(from + d));
}

// x (size) → codes −127 … 127 and the scale that makes them values again.
inline float to_codes(const float* x, int64_t size, int8_t* codes) {
    vf top{};
    for (int64_t d = 0; d < size; d += kLanes) {
        const vf v = load(x + d);
        top = max(max(v, -v), top);
    }
    const float most = highest(top);
    const vf magic = splat(12582912.0f), factor = splat(most > 0.0f ? 127.0f / most : 0.0f);
    int32_t whole[kMaxHead];
    for (int64_t d = 0; d < size; d += kLanes) {
        const vi v = bits(load(x + d) * factor + magic) - bits(magic);
        std::memcpy(whole + d, &v, sizeof v);
    }
    for (int64_t d = 0; d < size; d++) codes[d] = int8_t(std::max(-127, std::min(127, whole[d])));
    return most / 127.0f;
}

// `write_rows` for pages of codes. Codes are finite whatever they are, so only scales are cleared.
inline void write_codes(const Call& call, const xn_span& span, int64_t kv_head, int64_t first, int64_t end) {
    const int64_t size = call.plan->head_dim;
    int8_t codes[kMaxHead];
    for (int64_t i = first; i < end; i++) {
        const int64_t page = page_of(*call.plan, span, (span.start + i) / kPage), slot = (span.start + i) % kPage;
        const int64_t row = span.row + i, column = kv_head * size;
        uint8_t* keys = call.bytes(page, 0, kv_head) + 2 * slot;
        call.scales(page, 0, kv_head)[slot] = to_codes(call.k + row * call.ldk + column, size, codes);
        for (int64_t d = 0; d < size; d += 2) std::memcpy(keys + d * kPage, codes + d, 2);
        uint8_t* values = call.bytes(page, 1, kv_head) + (slot / 2) * 2 * size;
        float* scales = call.scales(page, 1, kv_head);
        if (slot % kColumns == 0) std::memset(scales + slot, 0, kColumns * sizeof(float));
        scales[slot] = to_codes(call.v + row * call.ldv + column, size, codes);
        auto* pairs = reinterpret_cast<uint16_t*>(values);
        if (slot % 2 == 0) {
            for (int64_t d = 0; d < size; d++) pairs[d] = uint8_t(codes[d]);
        } else {
            for (int64_t d = 0; d < size; d++) pairs[d] = uint16_t((pairs[d] & 0xff) | uint8_t(codes[d]) << 8);
        }
    }
}

// Rows first … end − 1 of a span into the tiles of one KV head, two at a time where they share a pair of V.
//
// A page may hold anything when it comes to a sequence, and nobody clears it: K that no row sees yields scores
// that are replaced, whatever they are. V must be finite where a weight is exactly 0, and weights are computed
// for 16 positions at once; so whoever writes the first of 16 positions clears the other 15, unless they follow
// in the same call. Positions of a sequence are written in order, so what is cleared was not valid.
inline void write_rows(const Call& call, const xn_span& span, int64_t kv_head, int64_t first, int64_t end) {
    if (call.coded()) return write_codes(call, span, kv_head, first, end);
    const int64_t size = call.plan->head_dim;
    alignas(64) uint16_t one[kMaxHead], two[kMaxHead];
    for (int64_t i = first, count; i < end; i += count) {
        const int64_t page = page_of(*call.plan, span, (span.start + i) / kPage), slot = (span.start + i) % kPage;
        const int64_t row = span.row + i, column = kv_head * size;
        count = slot % 2 == 0 && i + 1 < end ? 2 : 1;
        uint16_t* keys = call.tile(page, 0, kv_head) + 2 * slot;
        round_row(call.k + row * call.ldk + column, size, one);
        if (count == 2) {
            round_row(call.k + (row + 1) * call.ldk + column, size, two);
            for (int64_t d = 0; d < size; d += 2) {
                std::memcpy(keys + d * kPage, one + d, 4);
                std::memcpy(keys + d * kPage + 2, two + d, 4);
            }
        } else {
            for (int64_t d = 0; d < size; d += 2) std::memcpy(keys + d * kPage, one + d, 4);
        }
        uint16_t* values = call.tile(page, 1, kv_head) + (slot & ~int64_t{1}) * size;
        if (slot % kColumns == 0 && end - i < kColumns) std::memset(values, 0, kColumns * size * 2);
        round_row(call.v + row * call.ldv + column, size, one);
        if (count == 2) round_row(call.v + (row + 1) * call.ldv + column, size, two);
        auto* pairs = reinterpret_cast<uint32_t*>(values);
        if (count == 2) {
            for (int64_t d = 0; d < size; d++) pairs[d] = one[d] | uint32_t(two[d]) << 16;
        } else if (slot % 2 == 0) {
            for (int64_t d = 0; d < size; d++) pairs[d] = one[d];
        } else {
            for (int64_t d = 0; d < size; d++) pairs[d] = (pairs[d] & 0xffff) | uint32_t(one[d]) << 16;
        }
    }
}

// `count` codes, a multiple of 32, as bf16: exact, they have 7 bits.
inline void widen(const uint8_t* from, int64_t count, uint16_t* to) {
#if defined(__AVX512BF16__)
    for (int64_t i = 0; i < count; i += 32) {
        const __m512 low = _mm512_cvtepi32_ps(
            _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
        const __m512 high = _mm512_cvtepi32_ps(
            _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i + 16))));
        _mm512_storeu_si512(to + i, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
#else
    for (int64_t i = 0; i < count; i++) {
        const float value = float(int8_t(from[i]));
        uint32_t word;
        std::memcpy(&word, &value, 4);
        to[i] = uint16_t(word >> 16);
    }
#endif
}

// Accumulators' widths of a block that a row at `last_seen` (of that block) has anything to do with.
inline int columns_for(int64_t last_seen) {
    return int(std::min<int64_t>(kPage / kColumns, last_seen / kColumns + 1));
}
// A block that will be read next, and how much of it.
struct Place {
    int64_t page, kv_head;
    int columns;  // 0 = none
};
// The first `held` positions of a block's codes; K of the next page is drawn in meanwhile. Spread over the
// work like this, since prefetches at once wait for each other and everybody else for them.
inline void widen_block(
    const Call& call, int64_t page, int64_t kv_head, int64_t held, const Place& next, uint16_t* wide) {
    const int64_t size = call.plan->head_dim, lines = next.columns * kColumns * 2;
    const uint8_t* keys = call.bytes(page, 0, kv_head);
    const uint8_t* ahead = call.bytes(next.page, 0, next.kv_head);
    for (int64_t d = 0; d < size; d += 2) {
        for (int64_t i = 0; i < lines; i += 64) __builtin_prefetch(ahead + d * kPage + i, 0, 2);
        widen(keys + d * kPage, 2 * held, wide + d * kPage);
    }
    for (int which = 0; which < 2; which++)
        for (int64_t i = 0; i < kPage; i += 16) __builtin_prefetch(call.scales(next.page, which, next.kv_head) + i, 0, 2);
    widen(call.bytes(page, 1, kv_head), held * size, wide + kPage * size);
}

}  // namespace xn::attention

#endif  // XLLM_ATTENTION_PAGES_H
