// xn_linear and its fused forms: choose a tile shape, share the tiles among the threads, finish the product.
// Shapes and sharing decide speed only; see gemm.h for why they cannot decide a bit of the result.
#include <algorithm>
#include <atomic>

#include "xllm/formulas.h"
#include "xllm/gemm.h"
#include "xllm/rows.h"
#include "xllm/scratch.h"
#include "xllm/threads.h"

namespace xn {
namespace {

constexpr int64_t kBlockBytes = 512 << 10;  // of activations: half of L2, the rest is for weights
constexpr int64_t kGatedBytes = 8 << 20;    // of products that wait for their gate where panels do not match
constexpr int kMaxTileElements = 9 * 3 * kPanel;  // of the largest tile of all classes

thread_local Scratch t_rounded, t_product, t_unpacked;

struct Shape {
    int panels;           // of a tile
    int64_t block;        // rows of an item
    int64_t num_groups;   // of panels
    int64_t num_blocks;   // of rows
};

// The widest tile that takes all rows at once reads each weight once; two panels are best for many rows.
// Among equals the one that shares the panels most evenly.
int choose_panels(const ClassKernels& kernels, int64_t num_panels, int64_t rows, int threads) {
    int best = 2;
    int64_t best_cost = -1;
    for (int panels = kMaxTilePanels; panels >= 2; --panels) {
        if (rows > kernels.max_rows(panels) && panels > 2) continue;
        const int64_t groups = (num_panels + panels - 1) / panels;
        const int64_t cost = (groups + threads - 1) / threads * panels;
        if (best_cost < 0 || cost < best_cost) {
            best = panels;
            best_cost = cost;
        }
    }
    return best;
}

Shape choose(const ClassKernels& kernels, int64_t num_panels, int64_t rows, int64_t x_stride, int threads) {
    Shape shape;
    shape.panels = choose_panels(kernels, num_panels, rows, threads);
    const int64_t most = kernels.max_rows(shape.panels);
    shape.num_groups = (num_panels + shape.panels - 1) / shape.panels;
    const int64_t fit = std::max(most, kBlockBytes / x_stride / most * most);
    shape.num_blocks = (rows + fit - 1) / fit;
    shape.block = round_up((rows + shape.num_blocks - 1) / shape.num_blocks, most);
    shape.num_blocks = (rows + shape.block - 1) / shape.block;
    return shape;
}

struct Linear {
    const xn_matrix& m;
    const ClassKernels& kernels;
    const uint8_t* x;
    int64_t x_stride, rows;
    const float* bias;
    int32_t epilogue;
    const float* residual;
    int64_t ldr;
    float* y;
    int64_t ldy;
    int threads;
    int64_t half;  // panels from a gate to its up; 0 where nothing is gated
    Shape shape;

    bool gated() const { return half != 0; }

    // All tiles of one group of panels with one block of rows; false without memory.
    bool item(int64_t index) const {
        const int64_t group = index % shape.num_groups, block = index / shape.num_groups;
        const int64_t panel = group * shape.panels, end = gated() ? half : m.num_panels;
        const int panels = static_cast<int>(std::min<int64_t>(shape.panels, end - panel));
        const int64_t start = block * shape.block, count = std::min(shape.block, rows - start);
        const int64_t most = kernels.max_rows(panels), num_tiles = (count + most - 1) / most;
        const int64_t unpacked = kernels.unpack == nullptr ? 0 : round_up(kernels.unpacked_bytes(m), 64);
        uint8_t* memory = t_unpacked.at_least(unpacked * panels * (gated() ? 2 : 1));
        if (unpacked != 0 && memory == nullptr) return false;
        Tile one = tile_of(panel, panels, memory, unpacked), two{};
        if (gated()) two = tile_of(panel + half, panels, memory + unpacked * panels, unpacked);
        for (int64_t t = 0, row = start; t < num_tiles; ++t) {
            const int64_t here = (start + count - row + num_tiles - t - 1) / (num_tiles - t);
            const TileFn fn = kernels.tile(static_cast<int>(here), panels);
            draw_share(one, panel, panels, t, num_tiles);
            one.x = two.x = x + row * x_stride;
            if (gated()) {
                draw_share(two, panel + half, panels, t, num_tiles);
                gated_tile(one, two, fn, panel, panels, row, here);
            } else {
                one.y = y + row * ldy + panel * kPanel;
                if (residual != nullptr) one.residual = residual + row * ldr + panel * kPanel;
                fn(one);
            }
            row += here;
        }
        return true;
    }

    Tile tile_of(int64_t panel, int panels, uint8_t* memory, int64_t unpacked) const {
        Tile tile{};
        tile.matrix = &m;
        tile.x_stride = x_stride;
        tile.ldy = ldy;
        tile.ldr = ldr;
        tile.bias = bias == nullptr ? nullptr : bias + panel * kPanel;
        tile.columns = std::min(m.num_out - panel * kPanel, panels * kPanel);
        tile.half = m.half_scales;
        tile.w = m.panel(panel);
        tile.w_stride = m.panel_bytes;
        tile.scales = tile.w + m.scales_at;
        if (m.has_mins) tile.mins = tile.w + m.mins_at;
        if (unpacked != 0) {
            for (int p = 0; p < panels; ++p) kernels.unpack(m, m.panel(panel + p), memory + p * unpacked);
            tile.half = false;
            tile.w = memory;
            tile.w_stride = unpacked;
            tile.scales = memory + m.padded_in * kPanel * kGroupCodeBytes;
            if (m.has_mins) tile.mins = tile.scales + m.num_groups() * kPanel * 4;
        }
        return tile;
    }

    // Tile t of an item draws in its share of what this thread most likely reads next, so that memory is
    // never idle while the tiles compute.
    void draw_share(Tile& tile, int64_t panel, int panels, int64_t t, int64_t num_tiles) const {
        const int64_t steps = m.padded_in / kernels.step, total = panels * m.panel_bytes;
        const int64_t bytes = round_up((total + num_tiles * steps - 1) / (num_tiles * steps), 64);
        const int64_t first = t * bytes * steps;
        tile.ahead = m.panel(panel + shape.panels * threads) + first;
        tile.ahead_bytes = first < total ? bytes : 0;
    }

    // Gates and ups of the same channels, side by side in L1 until both are there.
    void gated_tile(
        Tile& one, Tile& two, TileFn fn, int64_t panel, int panels, int64_t row, int64_t count) const {
        alignas(64) float gates[kMaxTileElements], ups[kMaxTileElements];
        const int64_t width = panels * kPanel;
        one.ldy = two.ldy = width;
        one.y = gates;
        two.y = ups;
        fn(one);
        fn(two);
        for (int64_t r = 0; r < count; ++r) {
            float* to = y + (row + r) * ldy + panel * kPanel;
            gate(gates + r * width, ups + r * width, width, to);
        }
    }

    void gate(const float* g, const float* u, int64_t width, float* to) const {
        if (epilogue == XN_SILU_MUL) gate_row(g, u, width, to, [](vf v) { return silu(v); });
        else gate_row(g, u, width, to, [](vf v) { return gelu_tanh(v); });
    }

    int32_t run(xn_pool* pool) {
        shape = choose(kernels, gated() ? half : m.num_panels, rows, x_stride, threads);
        std::atomic<bool> failed{false};
        parallel(pool, shape.num_groups * shape.num_blocks, [&](int64_t index, int32_t) {
            if (!item(index)) failed.store(true);
        });
        return failed.load() ? XN_ERR_MEMORY : XN_OK;
    }

    // Where gates and ups do not share panel borders: whole products first, some rows at a time.
    int32_t run_unmatched(xn_pool* pool) {
        const int64_t width = m.num_out / 2;
        const int64_t piece = std::max<int64_t>(1, kGatedBytes / 4 / m.num_out);
        auto* product = reinterpret_cast<float*>(t_product.at_least(4 * m.num_out * std::min(rows, piece)));
        if (product == nullptr) return XN_ERR_MEMORY;
        for (int64_t row = 0; row < rows; row += piece) {
            Linear part = *this;
            part.x = x + row * x_stride;
            part.rows = std::min(piece, rows - row);
            part.y = product;
            part.ldy = m.num_out;
            if (part.run(pool) != XN_OK) return XN_ERR_MEMORY;
            for_rows(pool, part.rows, 4 * width, [&](int64_t first, int64_t last) {
                for (int64_t r = first; r < last; ++r)
                    gate(product + r * m.num_out, product + r * m.num_out + width, width, y + (row + r) * ldy);
            });
        }
        return XN_OK;
    }
};

bool valid(const xn_matrix& m, int32_t epilogue, const float* residual, int64_t ldr, int64_t ldy) {
    switch (epilogue) {
        case XN_STORE: return ldy >= m.num_out;
        case XN_ADD_RESIDUAL: return residual != nullptr && ldr >= m.num_out && ldy >= m.num_out;
        case XN_SILU_MUL:
        case XN_GELU_TANH_MUL: return m.num_out % 2 == 0 && ldy >= m.num_out / 2;
        default: return false;
    }
}

}  // namespace
}  // namespace xn

extern "C" {

int32_t xn_linear_fused(
    xn_pool* pool, const xn_matrix* matrix, const float* x, const uint8_t* rounded, int64_t rows, int64_t ldx,
    const float* bias, int32_t epilogue, const float* residual, int64_t ldr, float* y, int64_t ldy) {
    using namespace xn;
    if (matrix == nullptr || y == nullptr || rows < 1 || !valid(*matrix, epilogue, residual, ldr, ldy) ||
        (rounded == nullptr && (x == nullptr || ldx < matrix->num_in)))
        return XN_ERR_ARGUMENT;
    const xn_matrix& m = *matrix;
    const int64_t stride = rounded_stride(m);
    if (rounded == nullptr) {
        uint8_t* own = t_rounded.at_least(stride * rows);
        if (own == nullptr) return XN_ERR_MEMORY;
        round_rows(pool, m, x, rows, ldx, own);
        rounded = own;
    }
    const bool gated = epilogue == XN_SILU_MUL || epilogue == XN_GELU_TANH_MUL;
    const bool matched = gated && m.num_out / 2 % kPanel == 0;
    Linear linear{
        m, kernels_of(m), rounded, stride, rows, bias, epilogue,
        epilogue == XN_ADD_RESIDUAL ? residual : nullptr, ldr, y, ldy, xn_pool_size(pool),
        matched ? m.num_panels / 2 : 0, {}};
    return gated && !matched ? linear.run_unmatched(pool) : linear.run(pool);
}

int32_t xn_linear(
    xn_pool* pool, const xn_matrix* matrix, const float* x, int64_t rows, int64_t ldx, const float* bias,
    float* y, int64_t ldy) {
    return xn_linear_fused(pool, matrix, x, nullptr, rows, ldx, bias, XN_STORE, nullptr, 0, y, ldy);
}

}  // extern "C"
