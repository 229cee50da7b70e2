// Activations as the tiles read them: rounded once, for every linear that takes the same rows.
#include <atomic>

#include "xllm/formulas.h"
#include "xllm/gemm.h"
#include "xllm/scratch.h"
#include "xllm/threads.h"

namespace xn {
namespace {

constexpr int64_t kRowsAlone = 16 << 10;  // inputs worth rounding on one thread

thread_local Scratch t_normed;

// one(row) for every row, in pieces that are worth another thread.
template <class One>
void for_inputs(xn_pool* pool, const xn_matrix& m, int64_t rows, One&& one) {
    const int64_t piece = std::max<int64_t>(1, kRowsAlone / m.num_in);
    parallel(pool, (rows + piece - 1) / piece, [&](int64_t i, int32_t) {
        for (int64_t row = i * piece; row < std::min(rows, (i + 1) * piece); ++row) one(row);
    });
}

}  // namespace

const ClassKernels& kernels_of(const xn_matrix& m) {
    switch (m.weight_class) {
        case XN_W8G32: return kW8G32;
        case XN_W4G32: return kW4G32;
        case XN_W8G16: return kW8G16;
        case XN_W8A8: return kW8A8;
        default: return kBf16;
    }
}

void round_rows(
    xn_pool* pool, const xn_matrix& m, const float* x, int64_t rows, int64_t ldx, uint8_t* rounded) {
    const int64_t stride = rounded_stride(m);
    const auto round = kernels_of(m).round_row;
    for_inputs(pool, m, rows, [&](int64_t row) { round(m, x + row * ldx, rounded + row * stride); });
}

}  // namespace xn

extern "C" {

int64_t xn_rounded_stride(const xn_matrix* matrix) { return xn::rounded_stride(*matrix); }

int32_t xn_round_rows(
    xn_pool* pool, const xn_matrix* matrix, const float* x, int64_t rows, int64_t ldx, uint8_t* rounded) {
    if (matrix == nullptr || x == nullptr || rounded == nullptr || rows < 1 || ldx < matrix->num_in)
        return XN_ERR_ARGUMENT;
    xn::round_rows(pool, *matrix, x, rows, ldx, rounded);
    return XN_OK;
}

int32_t xn_rms_norm_rounded(
    xn_pool* pool, const xn_matrix* matrix, const float* x, int64_t rows, int64_t ldx, const float* weight,
    float eps, float offset, uint8_t* rounded) {
    using namespace xn;
    if (matrix == nullptr || x == nullptr || weight == nullptr || rounded == nullptr || rows < 1 ||
        ldx < matrix->num_in)
        return XN_ERR_ARGUMENT;
    const xn_matrix& m = *matrix;
    const int64_t stride = rounded_stride(m);
    const auto round = kernels_of(m).round_row;
    std::atomic<bool> failed{false};
    for_inputs(pool, m, rows, [&](int64_t row) {
        auto* normed = reinterpret_cast<float*>(t_normed.at_least(4 * m.num_in));
        if (normed == nullptr) return failed.store(true);
        norm_row(x + row * ldx, m.num_in, weight, eps, offset, normed);
        round(m, normed, rounded + row * stride);
    });
    return failed.load() ? XN_ERR_MEMORY : XN_OK;
}

}  // extern "C"
