// Splits the rows of an operation over the pool. Small operations stay on the caller: waking a thread costs
// more than they do.
#ifndef XLLM_ROWS_H
#define XLLM_ROWS_H

#include <algorithm>

#include "xllm_native.h"

namespace xn {

constexpr int64_t kPieceElements = 16384;  // about 5 µs of work

// f(first row, end row), called from several threads; `width` elements are touched per row.
template <class F>
inline void for_rows(xn_pool* pool, int64_t rows, int64_t width, F&& f) {
    int64_t piece = std::max<int64_t>(1, kPieceElements / std::max<int64_t>(1, width));
    if (pool == nullptr || rows <= piece) {
        f(int64_t(0), rows);
        return;
    }
    struct Context {
        F* f;
        int64_t rows, piece;
    } context{&f, rows, piece};
    xn_parallel(
        pool, (rows + piece - 1) / piece,
        [](void* raw, int64_t item, int32_t) {
            auto* c = static_cast<Context*>(raw);
            int64_t first = item * c->piece;
            (*c->f)(first, std::min(first + c->piece, c->rows));
        },
        &context);
}

}  // namespace xn

#endif  // XLLM_ROWS_H
