// The C ABI of xLLM's CPU kernels: everything Python may call, and nothing else is exported.
//
// Conventions. All functions return 0 or an XN_ERR_* code unless they say otherwise; no exception leaves
// them. Pointers are borrowed for the length of a call. Matrices are row-major; `ld…` counts elements
// between rows. A row's result never depends on which other rows a call has (numerics rules, design §1).
// A pool is used by one caller at a time; the caller's thread is its worker 0.
#ifndef XLLM_NATIVE_H
#define XLLM_NATIVE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define XN_EXPORT __attribute__((visibility("default")))

#define XN_ABI_VERSION 3  // raised with every change of this file
#define XN_GROUP 32       // inputs that share a scale in the quantised classes
#define XN_PAGE_SIZE 64   // positions in a KV page

enum { XN_OK = 0, XN_ERR_MEMORY = 1, XN_ERR_ARGUMENT = 2, XN_STOPPED = 3, XN_ASKS = 4, XN_DROPPED = 5 };

// Values are stored in files: do not renumber.
enum { XN_BF16 = 1, XN_W8G32 = 2, XN_W4G32 = 3, XN_W8G16 = 4, XN_W8A8 = 5 };

XN_EXPORT int32_t xn_abi_version(void);
XN_EXPORT const char* xn_isa(void);  // "avx512bf16", "avx2", "portable"

// ---- threads.cpp (N1) -------------------------------------------------------------------------------

typedef struct xn_pool xn_pool;
typedef void (*xn_item_fn)(void* context, int64_t item, int32_t worker);

// `num_threads` counts the caller; 1 starts no thread. NULL when threads cannot be had.
XN_EXPORT xn_pool* xn_pool_create(int32_t num_threads);
XN_EXPORT void xn_pool_destroy(xn_pool* pool);
XN_EXPORT int32_t xn_pool_size(const xn_pool* pool);
// How long a thread without work looks for more before it sleeps (10 at first); cores are burned for it.
XN_EXPORT void xn_pool_set_spin(xn_pool* pool, int32_t microseconds);

// Calls fn(context, item, worker) once for every item in [0, num_items), dynamically distributed, and
// returns when all are done. Items must not depend on each other. pool == NULL: all on the caller.
XN_EXPORT void xn_parallel(xn_pool* pool, int64_t num_items, xn_item_fn fn, void* context);

// ---- pack.cpp, quant.cpp, gemm_*.cpp (N1) --------------------------------------------------------------

// A packed (num_out, num_in) weight. num_out need not be a multiple of the panel: rows of zeros are added
// inside and never written to an output. num_in must be a multiple of 32 in the group classes and of 2 in bf16.
typedef struct xn_matrix xn_matrix;

XN_EXPORT int32_t xn_pack_bf16(
    xn_pool* pool, const float* rows, int64_t num_out, int64_t num_in, xn_matrix** made);

// value = scale · code + min; codes (num_out, num_in) one byte each, scales and mins (num_out, num_in/32);
// mins NULL = all zero. Codes of W8: int8 −128…127. Codes of W4: 0…15 (Q4_0 has min = −8 · scale).
XN_EXPORT int32_t xn_pack_w8g32(
    xn_pool* pool, const int8_t* codes, const float* scales, const float* mins, int64_t num_out,
    int64_t num_in, xn_matrix** made);
XN_EXPORT int32_t xn_pack_w4g32(
    xn_pool* pool, const uint8_t* codes, const float* scales, const float* mins, int64_t num_out,
    int64_t num_in, xn_matrix** made);

// As W8 above with scales and mins (num_out, num_in/16); activations are 8-bit per row and group of 16.
XN_EXPORT int32_t xn_pack_w8g16(
    xn_pool* pool, const int8_t* codes, const float* scales, const float* mins, int64_t num_out,
    int64_t num_in, xn_matrix** made);

// value = scale of the output channel · code; activations are 8-bit per row. num_in at most 65,536.
XN_EXPORT int32_t xn_pack_w8a8(
    xn_pool* pool, const int8_t* codes, const float* scales, int64_t num_out, int64_t num_in,
    xn_matrix** made);
// From float32 rows, symmetric: scale = max|w| of the channel / 127.
XN_EXPORT int32_t xn_quantize_w8a8(
    xn_pool* pool, const float* rows, int64_t num_out, int64_t num_in, xn_matrix** made);

// From float32 rows: symmetric 8-bit (scale = max|w| / 127), 4-bit with min (scale = (max − min) / 15).
XN_EXPORT int32_t xn_quantize_w8g32(
    xn_pool* pool, const float* rows, int64_t num_out, int64_t num_in, xn_matrix** made);
XN_EXPORT int32_t xn_quantize_w4g32(
    xn_pool* pool, const float* rows, int64_t num_out, int64_t num_in, xn_matrix** made);

XN_EXPORT void xn_matrix_free(xn_matrix* matrix);
XN_EXPORT int32_t xn_matrix_class(const xn_matrix* matrix);  // XN_BF16 …
XN_EXPORT int64_t xn_matrix_num_out(const xn_matrix* matrix);
XN_EXPORT int64_t xn_matrix_num_in(const xn_matrix* matrix);
XN_EXPORT int64_t xn_matrix_bytes(const xn_matrix* matrix);  // memory held

// ---- stored.cpp: packed weights as bytes, for a file that several processes map ------------------------
// A record is the matrix without its panels, `xn_matrix_record_bytes` long, and means something to the very
// library that made it only. Panels are `xn_matrix_bytes` long.
XN_EXPORT int64_t xn_matrix_record_bytes(void);
XN_EXPORT int32_t xn_matrix_record(const xn_matrix* matrix, void* record);
XN_EXPORT const void* xn_matrix_panels(const xn_matrix* matrix);
// A matrix over panels of the caller's, which must outlive it, may be read-only and stand on a cache line.
// Refuses a record that no packer of this library makes, or one whose panels have another length.
XN_EXPORT int32_t xn_matrix_over(
    const void* record, int64_t record_bytes, const void* panels, int64_t panels_bytes, xn_matrix** made);

// y[i] = the values of output channel ids[i], exactly as the matrix stands for them; ids must be in range.
// Single-threaded: callers split the ids.
XN_EXPORT int32_t xn_matrix_rows(
    const xn_matrix* matrix, const int64_t* ids, int64_t num_ids, float* y, int64_t ldy);

// y (rows, num_out) = x (rows, num_in) · matrixᵀ + bias (num_out) or NULL. x is rounded to bf16, or to 8-bit
// codes per row and group. y must not overlap x. 1 ≤ rows; ldx ≥ num_in, ldy ≥ num_out.
XN_EXPORT int32_t xn_linear(
    xn_pool* pool, const xn_matrix* matrix, const float* x, int64_t rows, int64_t ldx, const float* bias,
    float* y, int64_t ldy);

// What xn_linear_fused does with a product p = x · matrixᵀ + bias before it is written:
//   XN_STORE          y (rows, num_out) = p
//   XN_ADD_RESIDUAL   y (rows, num_out) = residual + p; residual may be y itself, with ldr = ldy
//   XN_SILU_MUL, XN_GELU_TANH_MUL   p = [g | u], num_out even: y (rows, num_out / 2) = act(g) · u
enum { XN_STORE = 0, XN_ADD_RESIDUAL = 1, XN_SILU_MUL = 2, XN_GELU_TANH_MUL = 3 };

// Bytes of a row of num_in inputs as the tiles of `matrix` read it. Rows rounded for one matrix serve every
// other of its num_in and kind: bf16 is one kind, the classes in groups of 32 together are another.
XN_EXPORT int64_t xn_rounded_stride(const xn_matrix* matrix);

// Rounds x (rows, num_in) as xn_linear would; `rounded` holds rows · xn_rounded_stride bytes, 64-aligned.
XN_EXPORT int32_t xn_round_rows(
    xn_pool* pool, const xn_matrix* matrix, const float* x, int64_t rows, int64_t ldx, uint8_t* rounded);

// xn_rms_norm over whole rows of num_in, then xn_round_rows, in one pass.
XN_EXPORT int32_t xn_rms_norm_rounded(
    xn_pool* pool, const xn_matrix* matrix, const float* x, int64_t rows, int64_t ldx, const float* weight,
    float eps, float offset, uint8_t* rounded);

// xn_linear with an epilogue, bit for bit what xn_linear followed by xn_add, xn_silu_mul or xn_gelu_tanh_mul
// gives. Reads `rounded` where it is not NULL (x and ldx are then unused), else rounds x.
XN_EXPORT int32_t xn_linear_fused(
    xn_pool* pool, const xn_matrix* matrix, const float* x, const uint8_t* rounded, int64_t rows, int64_t ldx,
    const float* bias, int32_t epilogue, const float* residual, int64_t ldr, float* y, int64_t ldy);

// ---- limits.cpp ----------------------------------------------------------------------------------------

// For benchmarks, which time them: `rounds` rounds of the class's multiplications from registers alone, on
// the caller's thread, returning the operations done (0 where this path has no such instruction); and one
// read of all the memory by the pool, returning a digest of it.
XN_EXPORT int64_t xn_multiply(int32_t weight_class, int64_t rounds);
XN_EXPORT int64_t xn_read_memory(xn_pool* pool, const uint8_t* from, int64_t bytes);

// ---- embed.cpp, elementwise.cpp (N2) -------------------------------------------------------------------

// y (rows, D) = table[ids] · scale; scale and product rounded to bf16 unless scale is 0, which means none.
XN_EXPORT int32_t xn_embedding(
    xn_pool* pool, const xn_matrix* table, const int64_t* ids, int64_t rows, float scale, float* y,
    int64_t ldy);

// Each run of `width` elements of x (rows, n · width) is normed by itself: x / √(mean(x²) + eps) · (offset + w).
XN_EXPORT int32_t xn_rms_norm(
    xn_pool* pool, const float* x, int64_t rows, int64_t n, int64_t width, int64_t ldx, const float* weight,
    float eps, float offset, float* y, int64_t ldy);

XN_EXPORT int32_t xn_add(
    xn_pool* pool, const float* x, int64_t ldx, const float* y, int64_t ldy, int64_t rows, int64_t width,
    float* z, int64_t ldz);

// gate_up (rows, 2 · width) = [g | u] → y (rows, width).
XN_EXPORT int32_t xn_silu_mul(
    xn_pool* pool, const float* gate_up, int64_t ldx, int64_t rows, int64_t width, float* y, int64_t ldy);
XN_EXPORT int32_t xn_gelu_tanh_mul(
    xn_pool* pool, const float* gate_up, int64_t ldx, int64_t rows, int64_t width, float* y, int64_t ldy);

// y = cap · tanh(x / cap)
XN_EXPORT int32_t xn_softcap(
    xn_pool* pool, const float* x, int64_t ldx, int64_t rows, int64_t width, float cap, float* y, int64_t ldy);

// Heads [a | b] of x (rows, num_heads · 2 · half) → [a·cos − b·sin | b·cos + a·sin]; cos and sin (rows, half).
XN_EXPORT int32_t xn_rope(
    xn_pool* pool, const float* x, int64_t ldx, int64_t rows, int64_t num_heads, int64_t half,
    const float* cos, const float* sin, int64_t ldr, float* y, int64_t ldy);

// y[i] = x[ids[i]]
XN_EXPORT int32_t xn_select_rows(
    xn_pool* pool, const float* x, int64_t ldx, const int64_t* ids, int64_t rows, int64_t width, float* y,
    int64_t ldy);

// ---- attention.cpp (N2) --------------------------------------------------------------------------------

// Rows `row` … row + num_rows − 1 of the step hold positions `start` … of one sequence; its blocks'
// pages are page_table[first_page …], where entry i holds positions [64·i, 64·i + 64), −1 = given back.
typedef struct {
    int64_t row, num_rows, start, first_page;
} xn_span;

typedef struct {
    const xn_span* spans;
    int64_t num_spans;
    const int64_t* page_table;
    int64_t num_heads, num_kv_heads, head_dim, num_layers;
    int64_t window;     // 0 = none
    int64_t num_items;  // filled by xn_attention_items
    const int32_t* items;
    int64_t kv_class;  // XN_KV_…
} xn_attention_plan;

// What pages hold: values in bf16, or 8-bit codes with a scale per position and KV head.
enum { XN_KV_BF16 = 0, XN_KV_INT8 = 1 };

// Writes this step's K and V into layer `layer` of the pages, then attends; what it reads is what it wrote,
// rounded. Pages consist of tiles, one per (page, K or V, layer, KV head), each of 64 · head_dim elements; K
// tiles are [head_dim/2][64][2], V tiles [64/2][head_dim][2]. Tiles of codes are followed by 64 float32 scales.
// A page need not be cleared before its first use: rows of a sequence must be written in order. scale > 0.
XN_EXPORT int32_t xn_attention(
    xn_pool* pool, const xn_attention_plan* plan, void* pages, int64_t layer, const float* q, int64_t ldq,
    const float* k, int64_t ldk, const float* v, int64_t ldv, float scale, float softcap, float* y,
    int64_t ldy);

// Fills plan work items: (span, first row within it, number of rows) triples, most expensive first; returns
// how many there are, at most `max_items` are written.
XN_EXPORT int64_t xn_attention_items(const xn_attention_plan* plan, int32_t* items, int64_t max_items);

// ---- step.cpp, program.cpp ------------------------------------------------------------------------------

// KV pages of the layers that share a group; pages as in xn_attention.
typedef struct {
    void* pages;
    int64_t num_pages, num_heads, num_kv_heads, head_dim, num_layers, window;
    int64_t kv_class;  // XN_KV_…
} xn_kv_group;

// What one step computes: its token ids, positions, rows that yield logits and one attention plan per group.
typedef struct xn_step xn_step;

XN_EXPORT xn_step* xn_step_create(const xn_kv_group* groups, int64_t num_groups);  // NULL: no memory
XN_EXPORT void xn_step_destroy(xn_step* step);

// `words`: for each sequence (number of rows, first position, first of the rows that yield logits, pages
// held in group 0, in group 1 …); then all rows' token ids; then the page numbers of group 0, of group 1 ….
// XN_ERR_ARGUMENT if a row would read or write a page that its sequence does not hold.
XN_EXPORT int32_t xn_step_set(xn_step* step, const int64_t* words, int64_t num_words, int64_t num_sequences);

// Where a replay finds a value: a byte offset into the arena or the carry, or an address. `ld` as everywhere.
enum { XN_IN_ARENA = 0, XN_IN_CARRY = 1, XN_AT_ADDRESS = 2 };
typedef struct {
    int64_t space, at, ld;
} xn_place;

enum {
    XN_OP_EMBEDDING = 1,  // to = weight[ids `index`] · a
    XN_OP_SELECT_ROWS,    // to = x[ids `index`], each below `limit` (0: below the step's number of rows)
    XN_OP_LINEAR,         // to = x · weightᵀ + vector
    XN_OP_RMS_NORM,       // to = `count` runs of `width` of x, times b + vector; eps = a
    XN_OP_ADD,            // to = x + y
    XN_OP_SILU_MUL,
    XN_OP_GELU_TANH_MUL,
    XN_OP_SOFTCAP,    // a = cap
    XN_OP_ROPE,       // `count` heads of x, `width` = half a head, y and z = cos and sin
    XN_OP_ATTENTION,  // x, y, z = q, k, v; `index` = group, `layer` within it, a = scale, b = softcap
    XN_OP_END_LAYER,  // layer `layer` of the model is complete
    XN_OP_RMS_NORM_ROUNDED,  // to = bytes for a product with weight: the norm of x times b + vector, eps = a
    XN_OP_LINEAR_FUSED,      // x (rounded if `count`), `epilogue`, y = residual
};

enum { XN_IDS_TOKENS = 0, XN_IDS_POSITIONS = 1, XN_IDS_LOGIT_ROWS = 2 };

typedef struct {
    int32_t op;
    int32_t logit_rows;  // 0: over all rows of the step, 1: over those that yield logits
    xn_place x, y, z, to;
    const xn_matrix* weight;
    const float* vector;  // norm weight or bias
    int64_t count, width, index, layer, limit;
    float a, b;
    int32_t epilogue;
    int32_t unused;
} xn_node;

// Words that other threads and processes may read and write while a program runs; each side's on its own line.
typedef struct {
    int32_t finished_layers;  // of the current or last step
    int32_t unused[15];
    int32_t stop;        // not 0: stop at the next end of a layer
    int32_t stop_after;  // not 0: stop when this many layers are complete
    int32_t unused_too[14];
} xn_control;

// Runs nodes[*position …] and leaves in *position how far it came. XN_STOPPED: called again with the same
// arguments it goes on there, if step, arena and carry are as it left them. step NULL: a program without
// inputs of a step, over `rows` rows; else the step's own counts are used. control may be NULL, and so may
// `stamps`, where it tells when (CLOCK_MONOTONIC, ns): in [0] when it began, in [1 + i] when layer i was complete.
XN_EXPORT int32_t xn_program_run(
    xn_pool* pool, const xn_node* nodes, int64_t num_nodes, const xn_step* step, int64_t rows, uint8_t* arena,
    uint8_t* carry, xn_control* control, int64_t* stamps, int64_t* position);

// ---- sample.cpp ----------------------------------------------------------------------------------------

// A row to draw from (docs/design/0002-sampler.md, steps 7 to 11). Its choices and tokens are the entries
// first … first + num_choices − 1 of the call's arrays.
typedef struct {
    const float* logits;      // (vocab), float32, after bias and penalties
    const uint32_t* allowed;  // token i may be drawn if bit i % 32 of word i / 32 is set; NULL = all may
    uint64_t seed;
    double top_p, min_p;      // 1 and 0 are off
    float temperature;        // 0 = argmax
    int32_t top_k;            // below 1 and from vocab on it is off
    uint32_t offset;
    int32_t num_choices;
    int64_t first;
} xn_sample_row;

// Per row, in `status`; the other rows are drawn all the same.
enum {
    XN_SAMPLE_NOT_FINITE = 101,    // NaN, or no finite maximum
    XN_SAMPLE_NONE_ALLOWED = 102,  // the mask leaves nothing
    XN_SAMPLE_OVERFLOW = 103,      // the temperature makes the largest logit infinite
};

XN_EXPORT int64_t xn_sample_bytes(const xn_pool* pool, int64_t vocab);  // of a workspace

// Apart from the forward pass, so that masks may be made while that runs. Logits are left as they are.
XN_EXPORT int32_t xn_sample(
    xn_pool* pool, const xn_sample_row* rows, int64_t num_rows, int64_t vocab, const uint32_t* choices,
    int64_t* tokens, int32_t* status, void* workspace);

// ---- queue.cpp -----------------------------------------------------------------------------------------

// Runs jobs on a thread of its own, in order, one after the other; two may be under way. While one runs the pool
// is the queue's, while one rests or none is under way the caller's. All calls from one thread.
typedef struct xn_queue xn_queue;

typedef struct {
    uint8_t* to;
    const uint8_t* from;
    int64_t bytes;
} xn_copy;

// The id of the step's row `row` is the token-th of those that the job before has drawn.
typedef struct {
    int64_t row, token;
} xn_pending;

// Logits of some of the rows that yield them, and what is drawn from those. `asks` not 0: the job rests when the
// logits are there, and the caller draws.
typedef struct {
    const xn_node* nodes;  // of a head
    int64_t num_nodes, num_rows;
    uint8_t* hidden;  // its rows in the carry
    const xn_sample_row* draws;
    int64_t num_draws;
    int32_t* status;  // of each draw
    int64_t asks;
} xn_slice;

// One step. What it points to must stay until it was collected; `tokens`, where the draws of all its slices go,
// until the job behind it was. A row that fails leaves its tokens as they are, so they begin as ids that may be read.
typedef struct {
    const xn_copy* copies;  // made first
    int64_t num_copies;
    xn_step* step;
    const xn_node* nodes;  // of the forward pass; none: only copies
    int64_t num_nodes;
    uint8_t* arena;
    uint8_t* carry;
    xn_control* control;
    int64_t* stamps;
    const xn_pending* pending;
    int64_t num_pending;
    const int64_t* drawn;  // `tokens` of the job before
    int64_t num_drawn;
    const xn_slice* slices;
    int64_t num_slices;
    const uint32_t* choices;  // as in xn_sample
    int64_t vocab;
    void* workspace;
    int64_t* tokens;
    int64_t began_ns, ended_ns;  // filled
    int32_t code;                // filled
    int32_t unused;
} xn_job;

XN_EXPORT xn_queue* xn_queue_create(xn_pool* pool);  // NULL: no memory, no thread
// Waits for the end of what runs at the moment; what has not begun is not run.
XN_EXPORT void xn_queue_destroy(xn_queue* queue);
// XN_ERR_ARGUMENT if two jobs are under way.
XN_EXPORT int32_t xn_queue_submit(xn_queue* queue, xn_job* job);
// Of the oldest job under way: XN_STOPPED (as xn_program_run) or XN_ASKS when it rests until xn_queue_go_on; else
// it has ended with this code and is no longer under way. XN_DROPPED: not begun, because the one before it failed.
XN_EXPORT int32_t xn_queue_wait(xn_queue* queue);
// Lets the job that rests go on, or end with a code other than XN_OK.
XN_EXPORT int32_t xn_queue_go_on(xn_queue* queue, int32_t code);

#ifdef __cplusplus
}
#endif

#endif  // XLLM_NATIVE_H
