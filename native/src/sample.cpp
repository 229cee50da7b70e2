// Tokens of a step from its rows of logits, as docs/design/0002-sampler.md defines them: the same tokens as the
// numpy sampler, bit for bit. A row is one item of work and depends on nothing else.
// Bias, penalties and whatever needs a request's history are added by the caller.
#include <algorithm>

#include "xllm/logits.h"
#include "xllm/race.h"
#include "xllm/threads.h"

using namespace xn;

namespace {

// Keeps what top_p leaves of the whole row, and at most what lies within `max_depth` of its top.
void keep_mass(
    const xn_sample_row& row, const float* x, int64_t n, const Top& top, double max_depth, Scratch& s) {
    Tokens& tokens = s.tokens;
    const float t = row.temperature, y_top = top.value / t;
    Range target = about_all(x, n, top, t);
    // Two roundings between these ends and the exact product; a target is never reached by nothing.
    target.low = std::max(target.low * row.top_p, 0x1p-64), target.high *= row.top_p;
    for (const double reach : {6.0, 12.0, double(kDepth)}) {
        const double depth = std::min(reach, max_depth);
        collect(x, n, floor_of(top, t, depth), t, tokens);
        if (double(weigh(tokens, y_top)) >= target.high || depth < reach) break;
    }
    Cut cut = find_cut(tokens, y_top, target.high, false, s.keys, s.sums);
    if (!(cut == find_cut(tokens, y_top, target.low, false, s.keys, s.sums))) {
        const double exact = row.top_p * double(weight_of_all(x, n, top, t));
        cut = find_cut(tokens, y_top, exact, false, s.keys, s.sums);
    }
    apply(tokens, cut);
}

// The tokens that top_k, top_p and min_p leave.
void filter(const xn_sample_row& row, const float* x, int64_t n, const Top& top, Scratch& s) {
    Tokens& tokens = s.tokens;
    const float t = row.temperature, y_top = top.value / t;
    const bool by_count = row.top_k > 0 && row.top_k < n, by_mass = row.top_p < 1.0, by_share = row.min_p > 0.0;
    // A weight below one is none, so a smaller min_p asks for nothing more.
    const double share = std::max(row.min_p, 0x1p-45);
    const double share_depth = by_share ? std::min(double(kDepth), 0.01 - exact_ln(share)) : kDepth;
    bool weighed = by_mass;
    if (by_count) {
        const float low = floor_of(top, t, by_mass ? kDepth : share_depth);
        collect(x, n, kth_bound(s, row.top_k, low, top.value), t, tokens);
        apply(tokens, find_cut(tokens, y_top, double(row.top_k), true, s.keys, s.sums));
        if (by_mass) {
            const double total = double(weigh(tokens, y_top));
            apply(tokens, find_cut(tokens, y_top, row.top_p * total, false, s.keys, s.sums));
        }
    } else if (by_mass) {
        keep_mass(row, x, n, top, share_depth, s);
    } else {
        collect(x, n, floor_of(top, t, share_depth), t, tokens);
    }
    if (!by_share) return;
    if (!weighed) weigh(tokens, y_top);
    int64_t kept = 0;
    for (int64_t i = 0; i < tokens.count; ++i) {
        if (double(tokens.weight[i]) < row.min_p * kWeightOne) continue;
        tokens.ids[kept] = tokens.ids[i], tokens.y[kept++] = tokens.y[i];
    }
    tokens.count = kept;
}

__attribute__((noinline)) int64_t draw_of_all(
    const float* x, int64_t n, const Top& top, float temperature, const Coordinates& at) {
    // Two chains of rounds at once: one alone waits for its own multiplications.
    constexpr int kBatches = 2, kVectors = 2 * kBatches;
    Race race(temperature, top.value, at);
    race.offer(top.value, top.id, token_word(top.id, at));
    int64_t id = 0;
    for (; id + kVectors * kLanes <= n; id += kVectors * kLanes) {
        vf chances[kVectors], most = splat(-INFINITY);
        for (int v = 0; v < kVectors; ++v) {
            chances[v] = race.chances(load(x + id + v * kLanes));
            most = higher(most, chances[v]);
        }
        if (race.all_hopeless(most)) continue;
        vi words[kVectors];
        words_from<kBatches>(id, at, words);
        uint32_t found[kVectors], any = 0;
        for (int v = 0; v < kVectors; ++v) any |= found[v] = race.passes(chances[v], words[v]);
        if (any == 0) continue;
        for (int v = 0; v < kVectors; ++v) {
            for (; found[v] != 0; found[v] &= found[v] - 1) {
                const int lane = __builtin_ctz(found[v]);
                const int64_t mine = id + v * kLanes + lane;
                race.offer(x[mine], mine, uint32_t(words[v][lane]));
            }
        }
    }
    for (; id < n; ++id) race.offer(x[id], id, token_word(id, at));
    return race.winner();
}

int64_t draw_of(Tokens& tokens, const Coordinates& at) {
    if (tokens.count == 1) return tokens.ids[0];
    int64_t best = 0;
    for (int64_t i = 1; i < tokens.count; ++i)
        if (tokens.y[i] > tokens.y[best]) best = i;
    for (int i = 0; i < kLanes; ++i) {
        tokens.ids[tokens.count + i] = 0;
        tokens.y[tokens.count + i] = -INFINITY;
    }
    Race race(1.0f, tokens.y[best], at);
    race.enter(tokens.y[best], tokens.ids[best], token_word(tokens.ids[best], at));
    for (int64_t i = 0; i < tokens.count; i += kLanes) {
        uint32_t words[kLanes];
        words_of(tokens.ids + i, at, words);
        words_of(tokens.ids + i + kWide, at, words + kWide);
        vi random;
        std::memcpy(&random, words, sizeof random);
        uint32_t found = race.passes(race.chances(load(tokens.y + i)), random);
        for (; found != 0; found &= found - 1) {
            const int lane = __builtin_ctz(found);
            if (i + lane < tokens.count) race.enter(tokens.y[i + lane], tokens.ids[i + lane], words[lane]);
        }
    }
    return race.winner();
}

int32_t sample_row(const xn_sample_row& row, int64_t n, Scratch& s, const uint32_t* choices, int64_t* tokens) {
    const float* x = row.logits;
    Top top = scan(x, n, s);
    if (top.broken || !std::isfinite(top.value)) return XN_SAMPLE_NOT_FINITE;
    if (row.allowed != nullptr) {
        mask(x, n, row.allowed, s.masked);
        x = s.masked;
        top = scan(x, n, s);
        if (top.value == -INFINITY) return XN_SAMPLE_NONE_ALLOWED;
    }
    if (row.temperature == 0.0f) {
        std::fill(tokens, tokens + row.num_choices, top.id);
        return XN_OK;
    }
    if (!std::isfinite(top.value / row.temperature)) return XN_SAMPLE_OVERFLOW;
    const bool whole = (row.top_k <= 0 || row.top_k >= n) && row.top_p >= 1.0 && row.min_p <= 0.0;
    if (!whole) filter(row, x, n, top, s);
    for (int64_t i = 0; i < row.num_choices; ++i) {
        const Coordinates at{row.seed, row.offset, choices[i]};
        tokens[i] = whole ? draw_of_all(x, n, top, row.temperature, at) : draw_of(s.tokens, at);
    }
    return XN_OK;
}

}  // namespace

extern "C" {

int64_t xn_sample_bytes(const xn_pool* pool, int64_t vocab) {
    return int64_t{xn_pool_size(pool)} * (Scratch::bytes(vocab) + kPad) + kPad;
}

int32_t xn_sample(
    xn_pool* pool, const xn_sample_row* rows, int64_t num_rows, int64_t vocab, const uint32_t* choices,
    int64_t* tokens, int32_t* status, void* workspace) {
    if (vocab < 1 || vocab > INT32_MAX - kPad) return XN_ERR_ARGUMENT;
    char* const base = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(workspace) + 63) & ~uintptr_t{63});
    const int64_t stride = (Scratch::bytes(vocab) + 63) & ~int64_t{63};
    parallel(pool, num_rows, [&](int64_t item, int32_t worker) {
        Scratch scratch(base + worker * stride, vocab);
        const xn_sample_row& row = rows[item];
        status[item] = sample_row(row, vocab, scratch, choices + row.first, tokens + row.first);
    });
    return XN_OK;
}

}  // extern "C"
