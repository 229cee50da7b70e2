// Tokens of a step from its rows of logits, as docs/design/0002-sampler.md defines them: the same tokens as the
// numpy sampler, bit for bit. A row is one item of work and depends on nothing else.
// Bias, penalties and whatever needs a request's history are added by the caller.
#include <algorithm>

#include "xllm/nucleus.h"
#include "xllm/race.h"
#include "xllm/threads.h"

using namespace xn;

namespace {

constexpr int64_t kBlock = 64 * kLanes;  // a group's maximum stands for one lane of 64 vectors
constexpr int64_t kPad = 64;

struct Top {
    float value;
    int64_t id;  // of the first
    bool broken;  // NaN somewhere
};

// One worker's memory. `words` of floats come first so that all stay aligned.
struct Scratch {
    Tokens tokens;
    uint32_t* keys;
    int64_t* sums;
    float *masked, *maxima;
    int64_t num_groups;

    static int64_t bytes(int64_t vocab) { return (vocab + kPad) * (2 * 8 + 5 * 4); }

    Scratch(char* at, int64_t vocab) {
        const int64_t room = vocab + kPad;
        const auto take = [&](int64_t size) { return at += room * size, at - room * size; };
        tokens.weight = reinterpret_cast<int64_t*>(take(8));
        sums = reinterpret_cast<int64_t*>(take(8));
        tokens.ids = reinterpret_cast<int32_t*>(take(4));
        tokens.y = reinterpret_cast<float*>(take(4));
        keys = reinterpret_cast<uint32_t*>(take(4));
        masked = reinterpret_cast<float*>(take(4));
        maxima = reinterpret_cast<float*>(take(4));
        tokens.count = num_groups = 0;
    }
};

inline vf load_or_lowest(const float* from, Whole) { return load(from); }
inline vf load_or_lowest(const float* from, Part part) {
    vf x = splat(-INFINITY);
    std::memcpy(&x, from, part.count * sizeof(float));
    return x;
}

Top scan(const float* x, int64_t n, Scratch& scratch) {
    vi broken{};
    vf most = splat(-INFINITY);
    scratch.num_groups = 0;
    for (int64_t first = 0; first < n; first += kBlock) {
        vf high[2] = {splat(-INFINITY), splat(-INFINITY)};
        each_vector(std::min(kBlock, n - first), [&](int64_t i, auto part) {
            const vf v = load_or_lowest(x + first + i, part);
            vf& into = high[(i / kLanes) & 1];
            into = higher(v, into);
            broken |= v != v;
        });
        high[0] = higher(high[0], high[1]);
        store(scratch.maxima + scratch.num_groups, high[0]);
        scratch.num_groups += kLanes;
        most = higher(most, high[0]);
    }
    Top top{highest(most), 0, false};
    for (int i = 0; i < kLanes; ++i) top.broken |= broken[i] != 0;
    if (top.broken || !(top.value > -INFINITY)) return top;
    int64_t group = 0;
    while (at_least(load(scratch.maxima + group), splat(top.value)) == 0) group += kLanes;
    for (top.id = group * 64; x[top.id] != top.value;) ++top.id;
    return top;
}

void mask(const float* x, int64_t n, const uint32_t* allowed, float* y) {
    for (int64_t i = 0; i < n; ++i) y[i] = allowed[i >> 5] >> (i & 31) & 1 ? x[i] : -INFINITY;
}

// Not above any logit that lies at most `depth` below the top when tempered.
float floor_of(const Top& top, float temperature, double depth) {
    const double t = temperature, x = top.value;
    const double low = x - depth * t - (std::fabs(x) + depth * t) * 1e-6 - 1e-37;
    return low < -3e38 ? -INFINITY : float(low);
}

// Not above the k-th largest logit, and not below `low`. Groups are disjoint, so k groups whose maxima
// reach a value hold k logits that do.
float kth_bound(const Scratch& scratch, int64_t k, float low, float high) {
    if (k > scratch.num_groups || low == -INFINITY) return low;
    for (int step = 0; step < 14 && low < high; ++step) {
        const float middle = low / 2 + high / 2;
        int64_t count = 0;
        for (int64_t g = 0; g < scratch.num_groups; g += kLanes)
            count += __builtin_popcount(at_least(load(scratch.maxima + g), splat(middle)));
        (count >= k ? low : high) = middle;
    }
    return low;
}

// All tokens that are not below `low` when both are tempered: equal ones are in or out together.
void collect(const float* x, int64_t n, float low, float temperature, Tokens& tokens) {
    const float y_low = low / temperature;
    const float before_rounding = low - std::fabs(low) * 1e-6f - 1e-37f;
    int64_t count = 0, kept = 0;
    each_vector(n, [&](int64_t i, auto part) {
        uint32_t found = at_least(load_or_lowest(x + i, part), splat(before_rounding));
        for (; found != 0; found &= found - 1) {
            const int64_t id = i + __builtin_ctz(found);
            if (id >= n) return;
            tokens.ids[count] = int32_t(id);
            tokens.y[count++] = x[id];
        }
    });
    std::fill(tokens.y + count, tokens.y + count + kLanes, 0.0f);
    for (int64_t i = 0; i < count; i += kLanes)
        store(tokens.y + i, load(tokens.y + i) / splat(temperature));
    for (int64_t i = 0; i < count; ++i) {
        tokens.ids[kept] = tokens.ids[i], tokens.y[kept] = tokens.y[i];
        kept += tokens.y[i] >= y_low;
    }
    tokens.count = kept;
}

int64_t weight_of_all(const float* x, int64_t n, const Top& top, float temperature) {
    const float y_top = top.value / temperature;
    const vf low = splat(floor_of(top, temperature, kDepth));
    vu sums{};
    each_vector(n, [&](int64_t i, auto part) {
        const vf v = load_or_lowest(x + i, part);
        if (at_least(v, low) == 0) return;
        float y[kLanes];
        store(y, v / splat(temperature));
        sums += weights_of(widened(y), y_top) + weights_of(widened(y + kWide), y_top);
    });
    int64_t sum = 0;
    for (int i = 0; i < kWide; ++i) sum += int64_t(sums[i]);
    return sum;
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
        const double target = row.top_p * double(weight_of_all(x, n, top, t));
        for (const double reach : {6.0, 12.0, double(kDepth)}) {
            const double depth = std::min(reach, share_depth);
            collect(x, n, floor_of(top, t, depth), t, tokens);
            if (double(weigh(tokens, y_top)) >= target || depth < reach) break;
        }
        apply(tokens, find_cut(tokens, y_top, target, false, s.keys, s.sums));
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

int64_t draw_of_all(const float* x, int64_t n, const Top& top, float temperature, const Coordinates& at) {
    Race race(temperature, top.value, at);
    race.offer(top.value, top.id, token_word(top.id, at));
    int64_t id = 0;
    for (; id + 2 * kLanes <= n; id += 2 * kLanes) {
        const vf chances[2] = {race.chances(load(x + id)), race.chances(load(x + id + kLanes))};
        if (race.all_hopeless(higher(chances[0], chances[1]))) continue;
        vi words[2];
        words_from(id, at, words);
        for (int half = 0; half < 2; ++half) {
            uint32_t found = race.passes(chances[half], words[half]);
            for (; found != 0; found &= found - 1) {
                const int lane = __builtin_ctz(found);
                const int64_t mine = id + half * kLanes + lane;
                race.offer(x[mine], mine, uint32_t(words[half][lane]));
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
