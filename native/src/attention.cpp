// Causal grouped-query attention over KV pages, in blocks of 64 positions in order.
//
// A work item is up to a few rows of one sequence for one KV head; its rows, times the query heads that
// share the KV head, are "folded rows". Both products are tiles of the same form: folded rows times a tile
// of pairs, since K stands in its pages as [dim/2][token][2] and V as [token/2][dim][2].
// Exactness: a folded row meets the same blocks in the same order whatever its company; a masked position has
// weight exactly 0, and a block that is masked throughout leaves maximum, sum and output as they were.
#include <algorithm>
#include <cstdlib>

#include "xllm/attention_pages.h"
#include "xllm/attention_product.h"
#include "xllm/attention_weights.h"
#include "xllm/rows.h"
#include "xllm_native.h"

using namespace xn;
using namespace xn::attention;

namespace {

constexpr int64_t kFolded = 48;  // folded rows a work item aims at

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
struct Item {
    int32_t span, first, rows;
};

// Whether the span has blocks first … last.
bool holds(const xn_attention_plan& plan, const xn_span& span, int64_t first, int64_t last) {
    const int64_t* pages = plan.page_table + span.first_page;
    if (span.base >= 0) return first >= pages[0];
    return std::all_of(pages + first, pages + last + 1, [](int64_t page) { return page >= 0; });
}

int64_t item_height(const xn_attention_plan& plan) {
    return std::max<int64_t>(1, kFolded / (plan.num_heads / plan.num_kv_heads));
}

Place start_of_item(const Call& call, int64_t index) {
    const auto& plan = *call.plan;
    if (index >= plan.num_items * plan.num_kv_heads) return Place{0, 0, 0};
    const int32_t* item = plan.items + 3 * (index / plan.num_kv_heads);
    const xn_span& span = plan.spans[item[0]];
    const int64_t block = first_block(plan, span, item[1]);
    const int64_t last_seen = span.start + item[1] + item[2] - 1 - block * kPage;
    return Place{page_of(plan, span, block), index % plan.num_kv_heads, columns_for(last_seen)};
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
template <bool kCoded>
void attend(const Call& call, int64_t index, const Scratch& room) {
    const auto& plan = *call.plan;
    const int32_t* item = plan.items + 3 * (index / plan.num_kv_heads);
    const int64_t kv_head = index % plan.num_kv_heads;
    const xn_span& span = plan.spans[item[0]];
    const int64_t first = item[1], rows = item[2], size = plan.head_dim;
    const int64_t per_head = plan.num_heads / plan.num_kv_heads, folded = rows * per_head;
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
    const Place after = start_of_item(call, index + call.stride);
    alignas(64) float scores[kRows * kPage];
    alignas(64) uint16_t weights[kRows * kPage];
    for (int64_t block = first_block(plan, span, first); block <= last_block; block++) {
        const int64_t begin = block * kPage, page = page_of(plan, span, block);
        const Place next = block == last_block
            ? after
            : Place{page_of(plan, span, block + 1), kv_head, columns_for(last - begin - kPage)};
        const uint16_t *keys = room.wide, *values = room.wide + kPage * size, *then = keys;
        Scales scales{nullptr, nullptr};
        bool ahead = true;  // the first rows of an item draw in what its other rows will find
        if (kCoded) {
            const int64_t held = columns_for(last - begin) * kColumns;
            widen_block(call, page, kv_head, held, next, room.wide);
            scales = {call.scales(page, 0, kv_head), call.scales(page, 1, kv_head)};
            if (next.columns) then = call.tile(next.page, 1, next.kv_head);
        } else {
            keys = call.tile(page, 0, kv_head);
            values = call.tile(page, 1, kv_head);
            if (next.columns) then = call.tile(next.page, 0, next.kv_head);
        }
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
                size / 2, scores, kPage, false,
                kCoded ? Ahead{then, kLine, ahead && next.columns} : Ahead{values, columns * kLine, ahead ? columns : 0});
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
                    kCoded ? Ahead{then + (size + d) / 2 * kLine, kLine, ahead && next.columns}
                           : Ahead{then + d * kPage, 2 * kPage, ahead ? next.columns : 0});
            }
            ahead = false;
        }
    }
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
            if (!holds(*plan, span, first_block(*plan, span, first), last)) return -1;
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
