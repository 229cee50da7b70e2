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
constexpr int64_t kFolded = 48;   // folded rows a work item aims at
constexpr int64_t kMaxHead = 512;  // largest head size
constexpr float kLowest = -3.0e38f;

// c[M][16·N] (+)= a[M][pairs] · b[pairs][16·N], all in pairs of bf16; one accumulator per element, in order.
// `ahead`, unless null, is a tile like b that will be wanted next.
#if defined(__AVX512BF16__)
template <int M, int N>
void tile_product(
    const uint32_t* a, int64_t lda, const uint16_t* b, int64_t ldb, int64_t pairs, float* c, int64_t ldc,
    bool add, const uint16_t* ahead) {
    __m512 sums[M][N];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
        for (int n = 0; n < N; n++)
            sums[m][n] = add ? _mm512_loadu_ps(c + m * ldc + n * kColumns) : _mm512_setzero_ps();
    for (int64_t p = 0; p < pairs; p++) {
        if (ahead != nullptr)
            for (int n = 0; n < N; n++) _mm_prefetch(ahead + p * ldb + n * 2 * kColumns, _MM_HINT_T1);
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
    bool add, const uint16_t*) {
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
    const uint32_t*, int64_t, const uint16_t*, int64_t, int64_t, float*, int64_t, bool, const uint16_t*);

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

    bool fit(int64_t folded, int64_t head_dim) {
        const int64_t rows = (folded + 15) / 16 * 16;
        const int64_t wanted = rows * (head_dim * 6 + kLanes * 4 + 4 + 8);
        if (wanted > size) {
            std::free(memory);
            memory = static_cast<uint8_t*>(std::aligned_alloc(64, (wanted + 63) / 64 * 64));
            size = memory == nullptr ? 0 : wanted;
            if (memory == nullptr) return false;
        }
        sums = reinterpret_cast<float*>(memory);
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
    uint16_t* pages;
    int64_t layer;
    const float *q, *k, *v;
    int64_t ldq, ldk, ldv;
    float scale, softcap;
    float* y;
    int64_t ldy;
    int64_t stride;  // items run at once: how far ahead this thread's next item is
    bool failed;

    uint16_t* tile(int64_t page, int64_t which, int64_t kv_head) const {
        const int64_t index = ((page * 2 + which) * plan->num_layers + layer) * plan->num_kv_heads + kv_head;
        return pages + index * kPage * plan->head_dim;
    }
};

inline vi lane_numbers() {
    vi lane;
    for (int i = 0; i < kLanes; i++) lane[i] = i;
    return lane;
}

// The first block that row `first` of a span sees anything of.
inline int64_t first_block(const xn_attention_plan& plan, const xn_span& span, int64_t first) {
    return plan.window > 0 ? std::max<int64_t>(0, span.start + first - plan.window + 1) / kPage : 0;
}

inline void round_row(const float* from, int64_t size, uint16_t* to) {
    for (int64_t d = 0; d < size; d += kLanes) store_bf16(to + d, load(from + d));
}

int64_t item_height(const xn_attention_plan& plan) {
    return std::max<int64_t>(1, kFolded / (plan.num_heads / plan.num_kv_heads));
}

// Rows first … end − 1 of a span into the tiles of one KV head.
void write_rows(const Call& call, const xn_span& span, int64_t kv_head, int64_t first, int64_t end) {
    const int64_t size = call.plan->head_dim;
    const int64_t* pages = call.plan->page_table + span.first_page;
    alignas(64) uint16_t rounded[kMaxHead];
    for (int64_t i = first; i < end; i++) {
        const int64_t page = pages[(span.start + i) / kPage], slot = (span.start + i) % kPage;
        round_row(call.k + (span.row + i) * call.ldk + kv_head * size, size, rounded);
        uint16_t* keys = call.tile(page, 0, kv_head) + 2 * slot;
        for (int64_t d = 0; d < size; d += 2) std::memcpy(keys + d * kPage, rounded + d, 4);
        round_row(call.v + (span.row + i) * call.ldv + kv_head * size, size, rounded);
        uint16_t* values = call.tile(page, 1, kv_head) + (slot / 2) * 2 * size + (slot & 1);
        for (int64_t d = 0; d < size; d++) values[2 * d] = rounded[d];
    }
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

// Scores of one folded row for the first 16 · `columns` positions of a block → weights as bf16. Keeps the
// row's maximum (in powers of two) and sums; scales what it has summed so far when the maximum rises.
inline void weigh(
    const float* scores, int columns, int64_t first_seen, int64_t last_seen, float scale, float softcap,
    float& most, float* totals, float* sums, int64_t head_dim, uint16_t* weights) {
    constexpr float kLog2e = 1.44269504088896341f;
    constexpr int kMost = kPage / kLanes;
    const int vectors = columns * (kColumns / kLanes);
    const bool all = first_seen <= 0 && last_seen >= columns * kColumns - 1;
    const vi low = splat(int32_t(std::max<int64_t>(first_seen, 0)));
    const vi high = splat(int32_t(std::min<int64_t>(last_seen, kPage)));
    vf s[kMost];
    vi seen[kMost];
    vf top = splat(kLowest);
    for (int i = 0; i < vectors; i++) {
        if (softcap == 0.0f) {
            s[i] = load(scores + i * kLanes) * splat(scale * kLog2e);
        } else {
            s[i] = xn::tanh(load(scores + i * kLanes) * splat(scale) / splat(softcap)) * splat(softcap * kLog2e);
        }
        if (!all) {
            const vi at = lane_numbers() + splat(int32_t(i * kLanes));
            seen[i] = (at >= low) & (at <= high);
            s[i] = select(seen[i], s[i], splat(kLowest));
        }
        top = max(top, s[i]);
    }
    const float before = most, after = std::max(before, highest(top));
    vf total = load(totals);
    if (after != before) {
        most = after;
        const vf shrink = exp2_of_negative(splat(before - after));
        total *= shrink;
        for (int64_t d = 0; d < head_dim; d += kLanes) store(sums + d, load(sums + d) * shrink);
    }
    for (int i = 0; i < vectors; i++) {
        vf w = exp2_of_negative(s[i] - splat(after));
        if (!all) w = floats(bits(w) & seen[i]);
        total += store_bf16(weights + i * kLanes, w);
    }
    store(totals, total);
}

void prefetch_item(const Call& call, int64_t index) {
    const auto& plan = *call.plan;
    if (index >= plan.num_items * plan.num_kv_heads) return;
    const int32_t* item = plan.items + 3 * (index / plan.num_kv_heads);
    const xn_span& span = plan.spans[item[0]];
    const int64_t page = plan.page_table[span.first_page + first_block(plan, span, item[1])];
    const uint16_t* keys = call.tile(page, 0, index % plan.num_kv_heads);
    for (int64_t i = 0; i < kPage * plan.head_dim; i += 32) __builtin_prefetch(keys + i, 0, 2);
}

void attend(const Call& call, int64_t index) {
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
        round_row(call.q + row * call.ldq + head * size, size, scratch.queries + f * size);
        scratch.most[f] = kLowest;
        scratch.positions[f] = span.start + first + f / per_head;
    }
    std::fill_n(scratch.sums, folded * size, 0.0f);
    std::fill_n(scratch.totals, folded * kLanes, 0.0f);
    const int64_t last_block = (span.start + first + rows - 1) / kPage;
    alignas(64) float scores[kRows * kPage];
    alignas(64) uint16_t weights[kRows * kPage];
    for (int64_t block = first_block(plan, span, first); block <= last_block; block++) {
        const int64_t begin = block * kPage;
        const uint16_t* keys = call.tile(pages[block], 0, kv_head);
        const uint16_t* values = call.tile(pages[block], 1, kv_head);
        const uint16_t* next = block < last_block ? call.tile(pages[block + 1], 0, kv_head) : nullptr;
        const uint16_t* values_ahead = values;  // while the first scores are computed
        for (int64_t f = 0; f < folded; f += kRows) {
            const int count = int(std::min<int64_t>(kRows, folded - f));
            // Positions behind all of these rows would add exactly nothing.
            const int64_t reach = scratch.positions[f + count - 1] - begin;
            if (reach < 0) continue;
            const int columns = int(std::min<int64_t>(kPage / kColumns, reach / kColumns + 1));
            kProducts[count - 1][columns - 1](
                reinterpret_cast<const uint32_t*>(scratch.queries + f * size), size / 2, keys, 2 * kPage, size / 2,
                scores, kPage, false, values_ahead);
            for (int i = 0; i < count; i++) {
                const int64_t last_seen = scratch.positions[f + i] - begin;
                const int64_t first_seen = plan.window > 0 ? last_seen - plan.window + 1 : 0;
                weigh(
                    scores + i * kPage, columns, first_seen, last_seen, call.scale, call.softcap,
                    scratch.most[f + i], scratch.totals + (f + i) * kLanes, scratch.sums + (f + i) * size, size,
                    weights + i * kPage);
            }
            for (int64_t d = 0; d < size; d += kWide * kColumns) {
                const int wide = int(std::min<int64_t>(kWide, (size - d) / kColumns));
                kProducts[count - 1][wide - 1](
                    reinterpret_cast<const uint32_t*>(weights), kPage / 2, values + 2 * d, 2 * size,
                    columns * kColumns / 2, scratch.sums + f * size + d, size, true,
                    next == nullptr ? nullptr : next + 2 * d);
            }
            values_ahead = next = nullptr;
        }
    }
    prefetch_item(call, index + call.stride);
    for (int64_t f = 0; f < folded; f++) {
        const int64_t row = span.row + first + f / per_head, head = kv_head * per_head + f % per_head;
        float* to = call.y + row * call.ldy + head * size;
        const vf factor = splat(1.0f / sum(load(scratch.totals + f * kLanes)));
        // + 0 makes −0 of an underflow +0, whichever way it came about.
        for (int64_t d = 0; d < size; d += kLanes)
            store(to + d, load(scratch.sums + f * size + d) * factor + splat(0.0f));
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
    return count;
}

int32_t xn_attention(
    xn_pool* pool, const xn_attention_plan* plan, uint16_t* pages, int64_t layer, const float* q, int64_t ldq,
    const float* k, int64_t ldk, const float* v, int64_t ldv, float scale, float softcap, float* y,
    int64_t ldy) {
    if (plan->head_dim % kColumns || plan->head_dim > kMaxHead || plan->num_heads % plan->num_kv_heads)
        return XN_ERR_ARGUMENT;
    Call call{plan, pages, layer,   q,       k, v,   ldq,                                  ldk,  ldv,
              scale, softcap, y, ldy, pool == nullptr ? 1 : xn_pool_size(pool), false};
    write_long_spans(pool, call);
    const auto run = [](void* raw, int64_t index, int32_t) {
        auto& c = *static_cast<Call*>(raw);
        const int64_t folded = item_height(*c.plan) * (c.plan->num_heads / c.plan->num_kv_heads);
        if (scratch.fit(folded, c.plan->head_dim)) {
            attend(c, index);
        } else {
            __atomic_store_n(&c.failed, true, __ATOMIC_RELAXED);
        }
    };
    xn_parallel(pool, plan->num_items * plan->num_kv_heads, run, &call);
    return call.failed ? XN_ERR_MEMORY : XN_OK;
}

}  // extern "C"
