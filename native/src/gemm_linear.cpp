// xn_linear: rounds the activations once, chooses a tile shape and shares the tiles among the threads.
// Shapes and sharing decide speed only; see gemm.h for why they cannot decide a bit of the result.
#include <stdlib.h>

#include <algorithm>

#include "xllm/classes.h"
#include "xllm/threads.h"

namespace xn {
namespace {

constexpr int64_t kBlockBytes = 512 << 10;  // of activations: half of L2, the rest is for weights
constexpr int64_t kRowsAlone = 16 << 10;    // inputs worth rounding on one thread

// The caller's rounded activations. One per thread that calls xn_linear; grows, never shrinks.
struct Scratch {
    uint8_t* memory = nullptr;
    int64_t bytes = 0;

    ~Scratch() { free(memory); }

    uint8_t* at_least(int64_t wanted) {
        if (wanted <= bytes) return memory;
        free(memory);
        bytes = round_up(std::max(wanted, 2 * bytes), 4096);
        memory = static_cast<uint8_t*>(aligned_alloc(4096, static_cast<size_t>(bytes)));
        if (memory == nullptr) bytes = 0;
        return memory;
    }
};

thread_local Scratch t_scratch;

struct Shape {
    int panels;           // of a tile
    int64_t block;        // rows of an item
    int64_t num_groups;   // of panels
    int64_t num_blocks;   // of rows
};

// The widest tile that takes all rows at once reads each weight once; two panels are best for many rows.
// Among equals the one that shares the panels most evenly.
int choose_panels(const xn_matrix& m, int64_t rows, int threads) {
    int best = 2;
    int64_t best_cost = -1;
    for (int panels = kMaxTilePanels; panels >= 2; --panels) {
        if (rows > max_tile_rows(m, panels) && panels > 2) continue;
        const int64_t groups = (m.num_panels + panels - 1) / panels;
        const int64_t cost = (groups + threads - 1) / threads * panels;
        if (best_cost < 0 || cost < best_cost) {
            best = panels;
            best_cost = cost;
        }
    }
    return best;
}

Shape choose(const xn_matrix& m, int64_t rows, int64_t x_stride, int threads) {
    Shape shape;
    shape.panels = choose_panels(m, rows, threads);
    const int64_t most = max_tile_rows(m, shape.panels);
    shape.num_groups = (m.num_panels + shape.panels - 1) / shape.panels;
    const int64_t fit = std::max(most, kBlockBytes / x_stride / most * most);
    shape.num_blocks = (rows + fit - 1) / fit;
    shape.block = round_up((rows + shape.num_blocks - 1) / shape.num_blocks, most);
    shape.num_blocks = (rows + shape.block - 1) / shape.block;
    return shape;
}

struct Linear {
    const xn_matrix& m;
    const uint8_t* x;
    int64_t x_stride, rows;
    const float* bias;
    float* y;
    int64_t ldy;
    Shape shape;
    int threads;

    // All tiles of one group of panels with one block of rows.
    void item(int64_t index) const {
        const int64_t group = index % shape.num_groups, block = index / shape.num_groups;
        const int64_t first_panel = group * shape.panels;
        const int panels = static_cast<int>(std::min<int64_t>(shape.panels, m.num_panels - first_panel));
        const int64_t start = block * shape.block, count = std::min(shape.block, rows - start);
        const int64_t most = max_tile_rows(m, panels), num_tiles = (count + most - 1) / most;
        Tile tile;
        tile.matrix = &m;
        tile.w = m.panel(first_panel);
        tile.x_stride = x_stride;
        tile.ldy = ldy;
        tile.bias = bias == nullptr ? nullptr : bias + first_panel * kPanel;
        tile.columns = std::min(m.num_out - first_panel * kPanel, panels * kPanel);
        // One row streams weights faster than it computes: look a little ahead. More rows leave time to
        // draw in what this thread most likely does next, while the first tile runs.
        tile.prefetch = rows == 1 ? 1024 : shape.panels * threads * m.panel_bytes;
        for (int64_t t = 0, row = start; t < num_tiles; ++t) {
            const int64_t here = (start + count - row + num_tiles - t - 1) / (num_tiles - t);
            tile.x = x + row * x_stride;
            tile.y = y + row * ldy + first_panel * kPanel;
            tile_of(m, static_cast<int>(here), panels)(tile);
            tile.prefetch = 0;
            row += here;
        }
    }
};

void round_rows(
    xn_pool* pool, const xn_matrix& m, const float* x, int64_t rows, int64_t ldx, uint8_t* to, int64_t stride) {
    const int64_t piece = std::max<int64_t>(1, kRowsAlone / m.num_in);
    parallel(pool, (rows + piece - 1) / piece, [&](int64_t i, int32_t) {
        for (int64_t row = i * piece; row < std::min(rows, (i + 1) * piece); ++row)
            round_row(m, x + row * ldx, to + row * stride);
    });
}

}  // namespace
}  // namespace xn

extern "C" int32_t xn_linear(
    xn_pool* pool, const xn_matrix* matrix, const float* x, int64_t rows, int64_t ldx, const float* bias,
    float* y, int64_t ldy) {
    using namespace xn;
    if (matrix == nullptr || x == nullptr || y == nullptr || rows < 1 || ldx < matrix->num_in ||
        ldy < matrix->num_out)
        return XN_ERR_ARGUMENT;
    const xn_matrix& m = *matrix;
    // An odd number of cache lines, so that rows do not fall on the same sets.
    const int64_t stride = (round_up(rounded_bytes(m), 64) / 64 | 1) * 64;
    uint8_t* rounded = t_scratch.at_least(stride * rows);
    if (rounded == nullptr) return XN_ERR_MEMORY;
    round_rows(pool, m, x, rows, ldx, rounded, stride);
    const int threads = xn_pool_size(pool);
    const Linear linear{m, rounded, stride, rows, bias, y, ldy, choose(m, rows, stride, threads), threads};
    parallel(pool, linear.shape.num_groups * linear.shape.num_blocks,
             [&](int64_t index, int32_t) { linear.item(index); });
    return XN_OK;
}
