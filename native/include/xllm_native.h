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

#define XN_ABI_VERSION 2  // raised with every change of this file
#define XN_GROUP 32       // inputs that share a scale in the quantised classes
#define XN_PAGE_SIZE 64   // positions in a KV page

enum { XN_OK = 0, XN_ERR_MEMORY = 1, XN_ERR_ARGUMENT = 2 };

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
} xn_attention_plan;

// Writes this step's K and V into layer `layer` of the pages, then attends. Pages: bf16 tiles, one per
// (page, K or V, layer, KV head), each 64 · head_dim elements, zeroed when made. K tiles are
// [head_dim/2][64][2], V tiles [64/2][head_dim][2].
XN_EXPORT int32_t xn_attention(
    xn_pool* pool, const xn_attention_plan* plan, uint16_t* pages, int64_t layer, const float* q, int64_t ldq,
    const float* k, int64_t ldk, const float* v, int64_t ldv, float scale, float softcap, float* y,
    int64_t ldy);

// Fills plan work items: (span, first row within it, number of rows) triples, most expensive first; returns
// how many there are, at most `max_items` are written.
XN_EXPORT int64_t xn_attention_items(const xn_attention_plan* plan, int32_t* items, int64_t max_items);

#ifdef __cplusplus
}
#endif

#endif  // XLLM_NATIVE_H
