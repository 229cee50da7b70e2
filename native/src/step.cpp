// From the flat description of a step to what its operations read. All checks of a step's input that a kernel
// relies on are made here, before any of them runs, except those against a table's size (program.cpp).
#include <cstdlib>
#include <cstring>
#include <new>

#include "xllm/step.h"

using namespace xn;

namespace {

constexpr int64_t kFields = 4;         // of a sequence, before the pages it holds in each group
constexpr int64_t kMaxRows = 1 << 24;  // of a step; keeps sums of hostile counts far from overflow
constexpr int64_t kMaxPosition = int64_t{1} << 40;

struct Sequence {
    int64_t rows, start, first_logit_row, space;
    const int64_t* held;  // pages in each group

    // Its words in a group's table.
    int64_t entries(int64_t g) const { return space < 0 ? held[g] : 1; }
};

Sequence sequence(const xn_step& step, int64_t index) {
    const int64_t* at = step.words.data + index * (kFields + step.num_groups);
    return Sequence{at[0], at[1], at[2], at[3], at + kFields};
}

// Counts rows and checks every sequence's numbers; the words must be exactly as long as these say.
bool count(xn_step& step, int64_t num_sequences, int64_t num_words) {
    int64_t rows = 0, logit_rows = 0, pages = 0;
    for (int64_t s = 0; s < num_sequences; s++) {
        const Sequence q = sequence(step, s);
        if (q.rows < 0 || q.rows > kMaxRows || q.start < 0 || q.start > kMaxPosition) return false;
        if (q.first_logit_row < 0 || q.first_logit_row > q.rows || q.space < -1) return false;
        for (int64_t g = 0; g < step.num_groups; g++) {
            if (q.held[g] < 0 || q.held[g] > kMaxPosition) return false;
            if (q.held[g] * XN_PAGE_SIZE < q.start + q.rows) return false;
            const xn_kv_group& group = step.groups[g];
            if (q.space >= 0 && (q.space >= group.num_spaces || q.held[g] > group.space_pages)) return false;
            pages += q.entries(g);
        }
        rows += q.rows;
        logit_rows += q.rows - q.first_logit_row;
        if (rows > kMaxRows || pages > num_words) return false;
    }
    step.num_rows = rows;
    step.num_logit_rows = logit_rows;
    return num_sequences * (kFields + step.num_groups) + rows + pages == num_words;
}

bool fill_rows(xn_step& step, int64_t num_sequences) {
    if (!step.positions.fit(step.num_rows) || !step.logit_rows.fit(step.num_logit_rows)) return false;
    int64_t row = 0, yielding = 0;
    for (int64_t s = 0; s < num_sequences; s++) {
        const Sequence q = sequence(step, s);
        for (int64_t i = 0; i < q.rows; i++) step.positions.data[row + i] = q.start + i;
        for (int64_t i = q.first_logit_row; i < q.rows; i++) step.logit_rows.data[yielding++] = row + i;
        row += q.rows;
    }
    step.ids[XN_IDS_TOKENS] = step.words.data + num_sequences * (kFields + step.num_groups);
    step.ids[XN_IDS_POSITIONS] = step.positions.data;
    step.ids[XN_IDS_LOGIT_ROWS] = step.logit_rows.data;
    return true;
}

// The attention plan of group g, whose page numbers begin at `table`; *num_table = how many there are.
int32_t fill_plan(xn_step& step, int64_t g, int64_t num_sequences, const int64_t* table, int64_t* num_table) {
    const xn_kv_group& group = step.groups[g];
    if (!step.spans[g].fit(num_sequences)) return XN_ERR_MEMORY;
    if (!step.items[g].fit(3 * (step.num_rows + num_sequences))) return XN_ERR_MEMORY;
    int64_t row = 0, first_page = 0;
    for (int64_t s = 0; s < num_sequences; s++) {
        const Sequence q = sequence(step, s);
        const int64_t base = q.space < 0 ? -1 : group.num_pages + q.space * group.space_pages;
        // Page numbers must be in the pool; what was given back must be a number of the sequence's pages.
        const int64_t least = base < 0 ? -1 : 0, limit = base < 0 ? group.num_pages : q.held[g] + 1;
        step.spans[g].data[s] = xn_span{row, q.rows, q.start, first_page, base};
        row += q.rows;
        for (const int64_t end = first_page + q.entries(g); first_page < end; first_page++)
            if (table[first_page] < least || table[first_page] >= limit) return XN_ERR_ARGUMENT;
    }
    xn_attention_plan plan{};
    plan.spans = step.spans[g].data;
    plan.num_spans = num_sequences;
    plan.page_table = table;
    plan.num_heads = group.num_heads;
    plan.num_kv_heads = group.num_kv_heads;
    plan.head_dim = group.head_dim;
    plan.num_layers = group.num_layers;
    plan.window = group.window;
    plan.kv_class = group.kv_class;
    plan.items = step.items[g].data;
    const int64_t room = step.num_rows + num_sequences;
    plan.num_items = xn_attention_items(&plan, step.items[g].data, room);
    if (plan.num_items < 0 || plan.num_items > room) return XN_ERR_ARGUMENT;
    step.plans[g] = plan;
    *num_table = first_page;
    return XN_OK;
}

}  // namespace

extern "C" {

xn_step* xn_step_create(const xn_kv_group* groups, int64_t num_groups) {
    if (num_groups < 0 || num_groups > kMaxGroups) return nullptr;
    xn_step* step = new (std::nothrow) xn_step;
    if (step == nullptr) return nullptr;
    step->num_groups = num_groups;
    for (int64_t g = 0; g < num_groups; g++) step->groups[g] = groups[g];
    return step;
}

void xn_step_destroy(xn_step* step) { delete step; }

int32_t xn_step_set(xn_step* step, const int64_t* words, int64_t num_words, int64_t num_sequences) {
    step->num_rows = step->num_logit_rows = 0;
    if (num_sequences < 0 || num_words < 0) return XN_ERR_ARGUMENT;
    if (num_sequences > num_words / (kFields + step->num_groups)) return XN_ERR_ARGUMENT;
    if (!step->words.fit(num_words)) return XN_ERR_MEMORY;
    if (num_words > 0) std::memcpy(step->words.data, words, num_words * sizeof(int64_t));
    int32_t code = XN_ERR_ARGUMENT;
    if (count(*step, num_sequences, num_words)) code = fill_rows(*step, num_sequences) ? XN_OK : XN_ERR_MEMORY;
    const int64_t* table = code == XN_OK ? step->ids[XN_IDS_TOKENS] + step->num_rows : nullptr;
    for (int64_t g = 0; g < step->num_groups && code == XN_OK; g++) {
        int64_t num_table = 0;
        code = fill_plan(*step, g, num_sequences, table, &num_table);
        table += num_table;
    }
    if (code != XN_OK) step->num_rows = step->num_logit_rows = 0;
    return code;
}

}  // extern "C"
