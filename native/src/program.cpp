// Replays recorded operations: one call a step, a loop over nodes, no decision that the recording has not made.
//
// The checks that need a step's values are here: ids against the table they select from. Memory is the
// caller's; a node's places were laid out for at least as many rows as the step has.
#include "xllm/clock.h"
#include "xllm/step.h"

namespace {

struct Run {
    xn_pool* pool;
    const xn_step* step;
    int64_t rows[2];  // of the step; that yield logits
    uint8_t* arena;
    uint8_t* carry;

    uint8_t* at(const xn_place& place) const {
        if (place.space == XN_IN_ARENA) return arena + place.at;
        if (place.space == XN_IN_CARRY) return carry + place.at;
        return reinterpret_cast<uint8_t*>(place.at);
    }
    float* floats(const xn_place& place) const { return reinterpret_cast<float*>(at(place)); }
};

int32_t select_rows(const Run& run, const xn_node& n, int64_t rows) {
    const int64_t* ids = run.step->ids[n.index];
    const int64_t limit = n.limit > 0 ? n.limit : run.rows[0];
    for (int64_t i = 0; i < rows; i++)
        if (ids[i] < 0 || ids[i] >= limit) return XN_ERR_ARGUMENT;
    return xn_select_rows(run.pool, run.floats(n.x), n.x.ld, ids, rows, n.width, run.floats(n.to), n.to.ld);
}

int32_t linear_fused(const Run& run, const xn_node& n, int64_t rows) {
    const bool rounded = n.count != 0;
    const float* residual = n.epilogue == XN_ADD_RESIDUAL ? run.floats(n.y) : nullptr;
    return xn_linear_fused(
        run.pool, n.weight, rounded ? nullptr : run.floats(n.x), rounded ? run.at(n.x) : nullptr, rows, n.x.ld,
        n.vector, n.epilogue, residual, n.y.ld, run.floats(n.to), n.to.ld);
}

int32_t run_node(const Run& run, const xn_node& n, int64_t rows) {
    xn_pool* pool = run.pool;
    const auto f = [&](const xn_place& place) { return run.floats(place); };
    float* to = f(n.to);
    switch (n.op) {
        case XN_OP_EMBEDDING:
            return xn_embedding(pool, n.weight, run.step->ids[n.index], rows, n.a, to, n.to.ld);
        case XN_OP_SELECT_ROWS:
            return select_rows(run, n, rows);
        case XN_OP_LINEAR:
            return xn_linear(pool, n.weight, f(n.x), rows, n.x.ld, n.vector, to, n.to.ld);
        case XN_OP_RMS_NORM:
            return xn_rms_norm(pool, f(n.x), rows, n.count, n.width, n.x.ld, n.vector, n.a, n.b, to, n.to.ld);
        case XN_OP_ADD:
            return xn_add(pool, f(n.x), n.x.ld, f(n.y), n.y.ld, rows, n.width, to, n.to.ld);
        case XN_OP_SILU_MUL:
            return xn_silu_mul(pool, f(n.x), n.x.ld, rows, n.width, to, n.to.ld);
        case XN_OP_GELU_TANH_MUL:
            return xn_gelu_tanh_mul(pool, f(n.x), n.x.ld, rows, n.width, to, n.to.ld);
        case XN_OP_SOFTCAP:
            return xn_softcap(pool, f(n.x), n.x.ld, rows, n.width, n.a, to, n.to.ld);
        case XN_OP_ROPE:
            return xn_rope(
                pool, f(n.x), n.x.ld, rows, n.count, n.width, f(n.y), f(n.z), n.y.ld, to, n.to.ld);
        case XN_OP_ATTENTION:
            return xn_attention(
                pool, &run.step->plans[n.index], run.step->groups[n.index].pages, n.layer, f(n.x), n.x.ld,
                f(n.y), n.y.ld, f(n.z), n.z.ld, n.a, n.b, to, n.to.ld);
        case XN_OP_RMS_NORM_ROUNDED:
            return xn_rms_norm_rounded(pool, n.weight, f(n.x), rows, n.x.ld, n.vector, n.a, n.b, run.at(n.to));
        case XN_OP_LINEAR_FUSED:
            return linear_fused(run, n, rows);
        default:
            return XN_ERR_ARGUMENT;
    }
}

bool needs_step(int32_t op) {
    return op == XN_OP_EMBEDDING || op == XN_OP_SELECT_ROWS || op == XN_OP_ATTENTION;
}

// Tells how far the step is; whether it shall stop here.
bool at_border(xn_control* control, int64_t layer) {
    const auto finished = static_cast<int32_t>(layer + 1);
    __atomic_store_n(&control->finished_layers, finished, __ATOMIC_RELEASE);
    return __atomic_load_n(&control->stop, __ATOMIC_ACQUIRE) != 0 ||
           __atomic_load_n(&control->stop_after, __ATOMIC_RELAXED) == finished;
}

}  // namespace

extern "C" int32_t xn_program_run(
    xn_pool* pool, const xn_node* nodes, int64_t num_nodes, const xn_step* step, int64_t rows, uint8_t* arena,
    uint8_t* carry, xn_control* control, int64_t* stamps, int64_t* position) {
    if (*position < 0 || *position > num_nodes) return XN_ERR_ARGUMENT;
    const int64_t all = step == nullptr ? rows : step->num_rows;
    const Run run{pool, step, {all, step == nullptr ? rows : step->num_logit_rows}, arena, carry};
    if (*position == 0 && control != nullptr) __atomic_store_n(&control->finished_layers, 0, __ATOMIC_RELEASE);
    if (*position == 0 && stamps != nullptr) stamps[0] = xn::now_ns();
    for (int64_t i = *position; i < num_nodes; i++) {
        const xn_node& node = nodes[i];
        if (node.op == XN_OP_END_LAYER) {
            if (stamps != nullptr) stamps[1 + node.layer] = xn::now_ns();
            if (control == nullptr || !at_border(control, node.layer)) continue;
            *position = i + 1;
            return XN_STOPPED;
        }
        const int64_t count = run.rows[node.logit_rows != 0];
        if (count == 0) continue;
        if (step == nullptr && needs_step(node.op)) return XN_ERR_ARGUMENT;
        const int32_t code = run_node(run, node, count);
        if (code != XN_OK) {
            *position = i;
            return code;
        }
    }
    *position = num_nodes;
    return XN_OK;
}
