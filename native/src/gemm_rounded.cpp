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

const ClassKernels kBf16 = {
    [](const xn_matrix& m) { return m.padded_in * 2; },
    [](const xn_matrix& m, const float* x, uint8_t* row) { to_bf16_row(x, m.num_in, m.padded_in, row); },
    [](int panels) { return max_bf16_rows(panels); },
    [](const xn_matrix&, int rows, int panels) { return bf16_tile(rows, panels); },
};

const ClassKernels kGroup = {
    [](const xn_matrix& m) { return m.padded_in + m.num_groups() * static_cast<int64_t>(sizeof(GroupInfo)); },
    [](const xn_matrix& m, const float* x, uint8_t* row) { to_group_row(x, m.num_in, m.padded_in, row); },
    [](int panels) { return max_group_rows(panels); },
    [](const xn_matrix& m, int rows, int panels) {
        return group_tile(rows, panels, m.weight_class == XN_W4G32);
    },
};

}  // namespace

const ClassKernels& kernels_of(const xn_matrix& m) { return m.weight_class == XN_BF16 ? kBf16 : kGroup; }

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
