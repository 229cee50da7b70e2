// Causal grouped-query attention over KV pages, in blocks of 64 positions in order.
//
// A work item is up to a few rows of one sequence for one KV head; its rows, times the query heads that
// share the KV head, are "folded rows". Both products are tiles of the same form: folded rows times a tile
// of pairs, since K stands in its pages as [dim/2][token][2] and V as [token/2][dim][2].
// Exactness: a folded row meets the same blocks in the same order whatever its company; a masked position has
// weight exactly 0, and a block that is masked throughout leaves maximum, sum and output as they were.
#include <algorithm>
#include <cstdlib>

#include "xllm/rows.h"
#include "xllm/simd.h"
#include "xllm_native.h"

using namespace xn;

namespace {

constexpr int kPage = XN_PAGE_SIZE;
constexpr int kRows = 6;          // folded rows of a tile: 6 · 4 accumulators of the 32 registers
constexpr int kColumns = 16;      // of an accumulator
constexpr int kWide = 4;          // accumulators side by side
constexpr int kLine = 32;         // elements of a cache line
constexpr int64_t kFolded = 48;   // folded rows a work item aims at
constexpr int64_t kMaxHead = 512;  // largest head size
constexpr float kLowest = -1.0e30f;  // below every score, and finite when scaled

// Cache lines that will be wanted next: `lines` of them at each step of `stride` elements. No more than that,
// since decoding is bound by what memory delivers.
struct Ahead {
    const uint16_t* from;
    int64_t stride;
    int lines;  // 0 = nothing
};

// c[M][16·N] (+)= a[M][pairs] · b[pairs][16·N], all in pairs of bf16; one accumulator per element, in order.
#if defined(__AVX512BF16__)
template <int M, int N>
void tile_product(
    const uint32_t* a, int64_t lda, const uint16_t* b, int64_t ldb, int64_t pairs, float* c, int64_t ldc,
    bool add, Ahead ahead) {
    __m512 sums[M][N];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
        for (int n = 0; n < N; n++)
            sums[m][n] = add ? _mm512_loadu_ps(c + m * ldc + n * kColumns) : _mm512_setzero_ps();
    for (int64_t p = 0; p < pairs; p++) {
        for (int n = 0; n < ahead.lines; n++)
            _mm_prefetch(ahead.from + p * ahead.stride + n * kLine, _MM_HINT_T1);
        __m512i right[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; n++)
            asm volatile("vmovdqu32 %1, %0"
                         : "=v"(right[n])
                         : "m"(*reinterpret_cast<const __m512i*>(b + p * ldb + n * 2 * kColumns)));
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            __m512i left;
            asm volatile("vpbroadcastd %1, %0" : "=v"(left) : "m"(a[m * lda + p]));
#pragma GCC unroll 8
            for (int n = 0; n < N; n++)
                asm volatile("vdpbf16ps %2, %1, %0" : "+v"(sums[m][n]) : "v"(left), "v"(right[n]));
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) _mm512_storeu_ps(c + m * ldc + n * kColumns, sums[m][n]);
}
#else
template <int M, int N>
void tile_product(
    const uint32_t* a, int64_t lda, const uint16_t* b, int64_t ldb, int64_t pairs, float* c, int64_t ldc,
    bool add, Ahead) {
    constexpr int kVectors = N * kColumns / kLanes;
    for (int m = 0; m < M; m++)
        for (int n = 0; n < kVectors; n++) {
            float* to = c + m * ldc + n * kLanes;
            vf total = add ? load(to) : vf{};
            for (int64_t p = 0; p < pairs; p++) {
                vi right;
                std::memcpy(&right, b + p * ldb + n * 2 * kLanes, sizeof right);
                const vi high = splat(int32_t(0xffff0000));
                const int32_t left = int32_t(a[m * lda + p]);
                total = fma(floats(splat(int32_t(uint32_t(left) << 16))), floats(right << 16), total);
                total = fma(floats(splat(left) & high), floats(right & high), total);
            }
            store(to, total);
        }
}
#endif

using Product = void (*)(
    const uint32_t*, int64_t, const uint16_t*, int64_t, int64_t, float*, int64_t, bool, Ahead);

#define XN_ROW(M) \
    { tile_product<M, 1>, tile_product<M, 2>, tile_product<M, 3>, tile_product<M, 4> }
constexpr Product kProducts[kRows][kWide] = {XN_ROW(1), XN_ROW(2), XN_ROW(3), XN_ROW(4), XN_ROW(5), XN_ROW(6)};
#undef XN_ROW

// Memory of one thread, kept between calls and grown when a model needs more.
struct Scratch {
    uint8_t* memory = nullptr;
    int64_t size = 0;
    float* sums;         // (folded, E) weighted V so far
    float* totals;       // (folded, kLanes) weights so far, lane by lane
    uint16_t* queries;   // (folded, E)
    float* most;         // (folded)
    int64_t* positions;  // (folded)
    uint16_t* wide;      // (2, 64 · E) a block's K and V in bf16, where pages hold codes

    bool fit(int64_t folded, int64_t head_dim) {
        const int64_t rows = (folded + 15) / 16 * 16;
        const int64_t wanted = rows * (head_dim * 6 + kLanes * 4 + 4 + 8) + 4 * kPage * head_dim;
        if (wanted > size) {
            std::free(memory);
            memory = static_cast<uint8_t*>(std::aligned_alloc(64, (wanted + 63) / 64 * 64));
            size = memory == nullptr ? 0 : wanted;
            if (memory == nullptr) return false;
        }
        wide = reinterpret_cast<uint16_t*>(memory);
        sums = reinterpret_cast<float*>(wide + 2 * kPage * head_dim);
        totals = sums + rows * head_dim;
        queries = reinterpret_cast<uint16_t*>(totals + rows * kLanes);
        most = reinterpret_cast<float*>(queries + rows * head_dim);
        positions = reinterpret_cast<int64_t*>(most + rows);
        return true;
    }
    ~Scratch() { std::free(memory); }
};

thread_local Scratch scratch;

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

inline void round_row(const float* from, int64_t size, uint16_t* to) {
    for (int64_t d = 0; d < size; d += kLanes) store_bf16(to + d, load(from + d));
}

struct Item {
    int32_t span, first, rows;
};

int64_t item_height(const xn_attention_plan& plan) {
    return std::max<int64_t>(1, kFolded / (plan.num_heads / plan.num_kv_heads));
}

void write_codes(const Call& call, const xn_span& span, int64_t kv_head, int64_t first, int64_t end);

// Rows first … end − 1 of a span into the tiles of one KV head, two at a time where they share a pair of V.
//
// A page may hold anything when it comes to a sequence, and nobody clears it: K that no row sees yields scores
// that are replaced, whatever they are. V must be finite where a weight is exactly 0, and weights are computed
// for 16 positions at once; so whoever writes the first of 16 positions clears the other 15, unless they follow
// in the same call. Positions of a sequence are written in order, so what is cleared was not valid.
void write_rows(const Call& call, const xn_span& span, int64_t kv_head, int64_t first, int64_t end) {
    if (call.coded()) return write_codes(call, span, kv_head, first, end);
    const int64_t size = call.plan->head_dim;
    const int64_t* pages = call.plan->page_table + span.first_page;
    alignas(64) uint16_t one[kMaxHead], two[kMaxHead];
    for (int64_t i = first, count; i < end; i += count) {
        const int64_t page = pages[(span.start + i) / kPage], slot = (span.start + i) % kPage;
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

// The same as `write_rows` for pages of codes. Codes are finite whatever they are, so only scales are cleared.
void write_codes(const Call& call, const xn_span& span, int64_t kv_head, int64_t first, int64_t end) {
    const int64_t size = call.plan->head_dim;
    const int64_t* pages = call.plan->page_table + span.first_page;
    int8_t codes[kMaxHead];
    for (int64_t i = first; i < end; i++) {
        const int64_t page = pages[(span.start + i) / kPage], slot = (span.start + i) % kPage;
        const int64_t row = span.row + i, column = kv_head * size;
        uint8_t* keys = call.bytes(page, 0, kv_head) + 2 * slot;
        call.scales(page, 0, kv_head)[slot] = to_codes(call.k + row * call.ldk + column, size, codes);
        for (int64_t d = 0; d < size; d += 2) std::memcpy(keys + d * kPage, codes + d, 2);
        uint8_t* values = call.bytes(page, 1, kv_head) + (slot / 2) * 2 * size + (slot & 1);
        float* scales = call.scales(page, 1, kv_head);
        if (slot % kColumns == 0) std::memset(scales + slot, 0, kColumns * sizeof(float));
        scales[slot] = to_codes(call.v + row * call.ldv + column, size, codes);
        for (int64_t d = 0; d < size; d++) values[2 * d] = uint8_t(codes[d]);
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

// The first `held` positions of a block's codes.
void widen_block(const Call& call, int64_t page, int64_t kv_head, int64_t held, uint16_t* wide) {
    const int64_t size = call.plan->head_dim;
    const uint8_t* keys = call.bytes(page, 0, kv_head);
    for (int64_t d = 0; d < size; d += 2) widen(keys + d * kPage, 2 * held, wide + d * kPage);
    widen(call.bytes(page, 1, kv_head), held * size, wide + kPage * size);
}

// Spans that one item covers are written by their items; of the others every item reads what others wrote.
void write_long_spans(xn_pool* pool, const Call& call) {
    const auto& plan = *call.plan;
    const int64_t height = item_height(plan), heads = plan.num_kv_heads;
    for (int64_t s = 0; s < plan.num_spans; s++) {
        const xn_span& span = plan.spans[s];
        if (span.num_rows <= height) continue;
        // Pieces end at page borders, so that no two threads write to one cache line.
        const int64_t lead = span.start % kPage;
        const int64_t pages = (lead + span.num_rows + kPage - 1) / kPage;
        for_rows(pool, pages * heads, 4 * kPage * plan.head_dim, [&](int64_t first, int64_t end) {
            for (int64_t piece = first; piece < end; piece++) {
                const int64_t from = piece / heads * kPage - lead;
                write_rows(
                    call, span, piece % heads, std::max<int64_t>(0, from), std::min(from + kPage, span.num_rows));
            }
        });
    }
}

// Lanes of vector i that a row sees, from a bit for each of the block's positions.
#if defined(__AVX512F__)
using Lanes = __mmask16;
inline Lanes lanes(uint64_t seen, int i) { return Lanes(seen >> (i * kLanes)); }
inline vf select(Lanes mask, vf a, vf b) { return (vf)_mm512_mask_blend_ps(mask, (__m512)b, (__m512)a); }
inline bool any_above(vf x, float limit) {
    return _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(limit), _CMP_GT_OQ) != 0;
}
#else
using Lanes = vi;
inline Lanes lanes(uint64_t seen, int i) {
    vi lane;
    for (int n = 0; n < kLanes; n++) lane[n] = n;
    return ((splat(int32_t(seen >> (i * kLanes) & 0xff)) >> lane) & splat(int32_t(1))) > splat(int32_t(0));
}
inline bool any_above(vf x, float limit) { return highest(x) > limit; }
#endif

// Positions first … last of a block, either of which may lie outside it.
inline uint64_t seen_between(int64_t first, int64_t last) {
    if (last < 0 || first >= kPage) return 0;
    return (~uint64_t{0} >> (kPage - 1 - std::min<int64_t>(last, kPage - 1)))
        & (~uint64_t{0} << std::max<int64_t>(first, 0));
}

inline void scale_scores(float* scores, int vectors, const float* scales) {
    for (int i = 0; i < vectors; i++)
        store(scores + i * kLanes, load(scores + i * kLanes) * load(scales + i * kLanes));
}

inline void cap_scores(float* scores, int vectors, float scale, float softcap) {
    for (int i = 0; i < vectors; i++) {
        float* at = scores + i * kLanes;
        store(at, xn::tanh(load(at) * splat(scale) / splat(softcap)) * splat(softcap));
    }
}

// Rounds weights to bf16 pairs and adds what they are now to the lanes of `total`.
template <int kMost>
inline vf keep_weights(const vf* w, int vectors, vf total, uint16_t* weights) {
#if defined(__AVX512BF16__)
    const __m512bh ones = (__m512bh)_mm512_set1_epi32(0x3f803f80);
    __m512 sum = (__m512)total;
#pragma GCC unroll 8
    for (int i = 0; i < kMost; i += 2) {
        if (i >= vectors) break;
        const __m512 odd = i + 1 < vectors ? (__m512)w[i + 1] : _mm512_setzero_ps();
        const __m512bh pairs = _mm512_cvtne2ps_pbh(odd, (__m512)w[i]);
        _mm512_storeu_si512(weights + i * kLanes, (__m512i)pairs);
        sum = _mm512_dpbf16_ps(sum, pairs, ones);
    }
    return (vf)sum;
#else
    for (int i = 0; i < vectors; i++) total += store_bf16(weights + i * kLanes, w[i]);
    return total;
#endif
}

// What a folded row keeps from block to block.
struct Row {
    float& most;    // highest score so far
    float* totals;  // weights so far, lane by lane
    float* sums;    // weighted V so far
};

// What a block's codes are multiplied by, position by position; null where pages hold values.
struct Scales {
    const float *keys, *values;
};

// Scores of one row for `vectors` vectors of positions → weights 2^((score − highest) · factor) as bf16.
// Scales what was summed so far when the highest rises. kAll: every position of the block is seen.
// Scales of V go into the weights before they are rounded, but not into their sum.
template <bool kAll, bool kCoded>
inline void weigh(
    const float* scores, int vectors, uint64_t seen, float factor, const Row& row, int64_t head_dim,
    const Scales& scales, uint16_t* weights) {
    constexpr int kMost = kPage / kLanes;
    if (kAll) vectors = kMost;
    vf s[kMost];
    vf top = splat(kLowest);
#pragma GCC unroll 16
    for (int i = 0; i < kMost; i++) {
        if (i >= vectors) break;
        s[i] = load(scores + i * kLanes);
        if (!kAll) s[i] = select(lanes(seen, i), s[i], splat(kLowest));
        top = max(s[i], top);
    }
    vf total = load(row.totals);
    if (__builtin_expect(any_above(top, row.most), 0)) {
        const float after = highest(top);
        const vf shrink = exp2_of_negative(splat((row.most - after) * factor));
        row.most = after;
        total *= shrink;
        for (int64_t d = 0; d < head_dim; d += kLanes) store(row.sums + d, load(row.sums + d) * shrink);
    }
    const vf offset = splat(-row.most * factor);
#pragma GCC unroll 16
    for (int i = 0; i < kMost; i++) {
        if (i >= vectors) break;
        s[i] = weight_of(fma(s[i], splat(factor), offset));
        if (!kAll) s[i] = select(lanes(seen, i), s[i], vf{});
        if (kCoded) {
            total += s[i];
            s[i] *= load(scales.values + i * kLanes);
        }
    }
    const vf rounded = keep_weights<kMost>(s, vectors, total, weights);
    store(row.totals, kCoded ? total : rounded);
}

// Accumulators' widths of a block that a row at `last_seen` (of that block) has anything to do with.
inline int columns_for(int64_t last_seen) {
    return int(std::min<int64_t>(kPage / kColumns, last_seen / kColumns + 1));
}

// K and V of a block of codes, with their scales.
void prefetch_codes(const Call& call, int64_t page, int64_t kv_head) {
    for (int which = 0; which < 2; which++) {
        const uint8_t* from = call.bytes(page, which, kv_head);
        for (int64_t i = 0; i < kPage * (call.plan->head_dim + 4); i += 64) __builtin_prefetch(from + i, 0, 2);
    }
}

void prefetch_item(const Call& call, int64_t index) {
    const auto& plan = *call.plan;
    if (index >= plan.num_items * plan.num_kv_heads) return;
    const int32_t* item = plan.items + 3 * (index / plan.num_kv_heads);
    const xn_span& span = plan.spans[item[0]];
    const int64_t block = first_block(plan, span, item[1]);
    const int64_t page = plan.page_table[span.first_page + block], kv_head = index % plan.num_kv_heads;
    if (call.coded()) {
        prefetch_codes(call, page, kv_head);
        return;
    }
    const uint16_t* keys = call.tile(page, 0, kv_head);
    const int columns = columns_for(span.start + item[1] + item[2] - 1 - block * kPage);
    for (int64_t pair = 0; pair < plan.head_dim / 2; pair++)
        for (int i = 0; i < columns; i++) __builtin_prefetch(keys + pair * 2 * kPage + i * kLine, 0, 2);
}

template <bool kCoded>
void attend(const Call& call, int64_t index, const Scratch& room) {
    const auto& plan = *call.plan;
    const int32_t* item = plan.items + 3 * (index / plan.num_kv_heads);
    const int64_t kv_head = index % plan.num_kv_heads;
    const xn_span& span = plan.spans[item[0]];
    const int64_t first = item[1], rows = item[2], size = plan.head_dim;
    const int64_t per_head = plan.num_heads / plan.num_kv_heads, folded = rows * per_head;
    const int64_t* pages = plan.page_table + span.first_page;
    if (rows == span.num_rows) write_rows(call, span, kv_head, 0, rows);
    for (int64_t f = 0; f < folded; f++) {
        const int64_t row = span.row + first + f / per_head, head = kv_head * per_head + f % per_head;
        round_row(call.q + row * call.ldq + head * size, size, room.queries + f * size);
        room.most[f] = kLowest;
        room.positions[f] = span.start + first + f / per_head;
    }
    std::fill_n(room.sums, folded * size, 0.0f);
    std::fill_n(room.totals, folded * kLanes, 0.0f);
    const int64_t last = span.start + first + rows - 1, last_block = last / kPage;
    alignas(64) float scores[kRows * kPage];
    alignas(64) uint16_t weights[kRows * kPage];
    for (int64_t block = first_block(plan, span, first); block <= last_block; block++) {
        const int64_t begin = block * kPage;
        const bool more = block < last_block;
        const uint16_t *keys = room.wide, *values = room.wide + kPage * size, *next = keys;
        Scales scales{nullptr, nullptr};
        bool ahead = !kCoded;  // the first rows of an item draw in what its other rows will find
        if (kCoded) {
            scales = {call.scales(pages[block], 0, kv_head), call.scales(pages[block], 1, kv_head)};
            const int64_t held = columns_for(last - begin) * kColumns;
            widen_block(call, pages[block], kv_head, held, room.wide);
            if (more) prefetch_codes(call, pages[block + 1], kv_head);
        } else {
            keys = call.tile(pages[block], 0, kv_head);
            values = call.tile(pages[block], 1, kv_head);
            if (more) next = call.tile(pages[block + 1], 0, kv_head);
        }
        const int next_columns = more ? columns_for(last - begin - kPage) : 0;
        for (int64_t f = 0, left = (folded + kRows - 1) / kRows; left > 0; left--) {
            // Groups of nearly equal height: 4 + 3 rows take less time than 6 + 1.
            const int count = int((folded - f + left - 1) / left);
            const int64_t at = f;
            f += count;
            // Positions behind all of these rows would add exactly nothing.
            const int64_t reach = room.positions[at + count - 1] - begin;
            if (reach < 0) continue;
            const int columns = columns_for(reach), vectors = columns * (kColumns / kLanes);
            kProducts[count - 1][columns - 1](
                reinterpret_cast<const uint32_t*>(room.queries + at * size), size / 2, keys, 2 * kPage,
                size / 2, scores, kPage, false, Ahead{values, columns * kLine, ahead ? columns : 0});
            for (int i = 0; i < count; i++) {
                const int64_t last_seen = room.positions[at + i] - begin;
                const int64_t first_seen = plan.window > 0 ? last_seen - plan.window + 1 : 0;
                const Row row{
                    room.most[at + i], room.totals + (at + i) * kLanes, room.sums + (at + i) * size};
                float* from = scores + i * kPage;
                uint16_t* to = weights + i * kPage;
                if (kCoded) scale_scores(from, vectors, scales.keys);
                if (call.softcap != 0.0f) cap_scores(from, vectors, call.scale, call.softcap);
                const bool all = first_seen <= 0 && last_seen >= kPage - 1;
                if (all) {
                    weigh<true, kCoded>(from, vectors, 0, call.factor, row, size, scales, to);
                } else {
                    const uint64_t seen = seen_between(first_seen, last_seen);
                    weigh<false, kCoded>(from, vectors, seen, call.factor, row, size, scales, to);
                }
            }
            for (int64_t d = 0; d < size; d += kWide * kColumns) {
                const int wide = int(std::min<int64_t>(kWide, (size - d) / kColumns));
                kProducts[count - 1][wide - 1](
                    reinterpret_cast<const uint32_t*>(weights), kPage / 2, values + 2 * d, 2 * size,
                    columns * kColumns / 2, room.sums + at * size + d, size, true,
                    Ahead{next + d * kPage, 2 * kPage, ahead ? next_columns : 0});
            }
            ahead = false;
        }
    }
    prefetch_item(call, index + call.stride);
    for (int64_t f = 0; f < folded; f++) {
        const int64_t row = span.row + first + f / per_head, head = kv_head * per_head + f % per_head;
        float* to = call.y + row * call.ldy + head * size;
        const vf factor = splat(1.0f / sum(load(room.totals + f * kLanes)));
        // + 0 makes −0 of an underflow +0, whichever way it came about.
        for (int64_t d = 0; d < size; d += kLanes)
            store(to + d, load(room.sums + f * size + d) * factor + splat(0.0f));
    }
}

}  // namespace

extern "C" {

int64_t xn_attention_items(const xn_attention_plan* plan, int32_t* items, int64_t max_items) {
    const int64_t height = item_height(*plan);
    int64_t count = 0;
    for (int64_t s = 0; s < plan->num_spans; s++) {
        const xn_span& span = plan->spans[s];
        // From the end: the last rows of a sequence have most to read.
        for (int64_t end = span.num_rows; end > 0; end -= height) {
            const int64_t first = std::max<int64_t>(0, end - height), rows = end - first;
            const int64_t last = (span.start + first + rows - 1) / kPage;
            for (int64_t b = first_block(*plan, span, first); b <= last; b++)
                if (plan->page_table[span.first_page + b] < 0) return -1;
            if (count < max_items) {
                items[3 * count] = int32_t(s);
                items[3 * count + 1] = int32_t(first);
                items[3 * count + 2] = int32_t(rows);
            }
            count++;
        }
    }
    // A long item taken last would leave the other threads idle.
    auto* list = reinterpret_cast<Item*>(items);
    const auto num_blocks = [plan](const Item& item) {
        const xn_span& span = plan->spans[item.span];
        return (span.start + item.first + item.rows - 1) / kPage - first_block(*plan, span, item.first);
    };
    std::sort(list, list + std::min(count, max_items), [&](const Item& a, const Item& b) {
        const int64_t left = num_blocks(a), right = num_blocks(b);
        if (left != right) return left > right;
        return a.span != b.span ? a.span < b.span : a.first > b.first;
    });
    return count;
}

int32_t xn_attention(
    xn_pool* pool, const xn_attention_plan* plan, void* pages, int64_t layer, const float* q, int64_t ldq,
    const float* k, int64_t ldk, const float* v, int64_t ldv, float scale, float softcap, float* y,
    int64_t ldy) {
    if (plan->head_dim % kColumns || plan->head_dim > kMaxHead || plan->num_heads % plan->num_kv_heads
        || !(scale > 0.0f))
        return XN_ERR_ARGUMENT;
    constexpr float kLog2e = 1.44269504088896341f;
    // Capped scores are scaled already.
    const float factor = softcap != 0.0f ? kLog2e : scale * kLog2e;
    Call call{plan, static_cast<uint8_t*>(pages), layer, q, k, v, ldq, ldk, ldv, scale, softcap, factor, y, ldy, 1, false};
    if (pool != nullptr) call.stride = xn_pool_size(pool);
    write_long_spans(pool, call);
    const auto run = [](void* raw, int64_t index, int32_t) {
        auto& c = *static_cast<Call*>(raw);
        const int64_t folded = item_height(*c.plan) * (c.plan->num_heads / c.plan->num_kv_heads);
        if (scratch.fit(folded, c.plan->head_dim)) {
            (c.coded() ? attend<true> : attend<false>)(c, index, scratch);
        } else {
            __atomic_store_n(&c.failed, true, __ATOMIC_RELAXED);
        }
    };
    xn_parallel(pool, plan->num_items * plan->num_kv_heads, run, &call);
    return call.failed ? XN_ERR_MEMORY : XN_OK;
}

}  // extern "C"
