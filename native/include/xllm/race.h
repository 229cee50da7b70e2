// The draw itself: argmax of (tempered logit + noise), ties to the lowest id. Most tokens are passed over by a
// test on their random word alone; whoever passes it gets the exact score, so the test decides speed only.
// What must not live here: which tokens take part.
#ifndef XLLM_RACE_H
#define XLLM_RACE_H

#include "xllm/noise.h"

namespace xn {

// A token beats the score B only if its noise is at least d = B − y; as −ln u > 1 − u, its word's complement
// is then below 2³² · exp(−d). An upper bound of that, without exp: a float's bits read as a number are its
// logarithm, piecewise linear, and the chord lies above the curve. In units of 2²³, for half the complement:
class Race {
   public:
    Race(float temperature, float top, const Coordinates& at) : at_(at), temperature_(temperature) {
        const double slope = kLog2E / double(temperature) * 0x1p23;
        slope_ = float(slope);
        // Beyond that float32 cannot tell what the test needs; then every token gets its score.
        exact_only_ = !(std::fabs(double(top) / double(temperature)) < 1e20 && slope < 1e30);
    }

    void offer(float x, int64_t id, uint32_t word) { enter(x / temperature_, id, word); }

    void enter(float y, int64_t id, uint32_t word) {
        const double score = double(y) + gumbel(word);
        if (id_ >= 0 && (score < best_ || (score == best_ && id >= id_))) return;
        best_ = score, id_ = id;
        const double goal = best_ * kLog2E;
        start_ = float((127.0 + 31.0 + 1e-3 + std::fabs(goal) * 1e-6 - goal) * 0x1p23);
    }

    // What `passes` takes: higher for tokens that are more likely to win.
    vf chances(vf x) const { return fma(x, splat(slope_), splat(start_)); }

    // Bit i: no word could make token i win.
    bool all_hopeless(vf chances) const {
        return !exact_only_ && at_least(chances, splat(125.0f * 0x1p23f)) == 0;
    }

    // Bit i: token i may win with word i.
    uint32_t passes(vf chances, vi words) const {
        if (exact_only_) return (uint64_t{1} << kLanes) - 1;
        const vf bounded = lower(higher(chances, splat(0.0f)), splat(159.0f * 0x1p23f));
        const vf ceiling = floats(__builtin_convertvector(bounded, vi));
        const vi half = (~words >> 1) & splat(int32_t(0x7fffffff));
        return at_least(ceiling, __builtin_convertvector(half, vf));
    }

    const Coordinates& at() const { return at_; }
    int64_t winner() const { return id_; }

   private:
    Coordinates at_;
    float temperature_, slope_ = 0, start_ = 0;
    bool exact_only_ = false;
    double best_ = 0;
    int64_t id_ = -1;
};

// Words of the 2 · kLanes · batches tokens from `id`, a multiple of 4, in order.
template <int batches>
__attribute__((always_inline)) inline void words_from(int64_t id, const Coordinates& at, vi words[2 * batches]) {
    vu c[batches][4];
    uint64_t counters[kWide];
    for (int i = 0; i < kWide; ++i) counters[i] = uint64_t(i);
    vu counter;
    std::memcpy(&counter, counters, sizeof counter);
    for (int i = 0; i < batches; ++i) c[i][0] = counter + ((uint64_t(id) >> 2) + uint64_t(i * kWide));
    philox(c, at);
    for (int i = 0; i < batches; ++i) {
        const vu low = vu{} + 0xffffffffu;
        const vu a = (c[i][0] & low) | (c[i][1] << 32), b = (c[i][2] & low) | (c[i][3] << 32);
#if defined(__AVX512F__)
        words[2 * i] = (vi)__builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
        words[2 * i + 1] = (vi)__builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#elif defined(__AVX2__) && defined(__FMA__)
        words[2 * i] = (vi)__builtin_shufflevector(a, b, 0, 4, 1, 5);
        words[2 * i + 1] = (vi)__builtin_shufflevector(a, b, 2, 6, 3, 7);
#else
        words[2 * i] = (vi)__builtin_shufflevector(a, b, 0, 2);
        words[2 * i + 1] = (vi)__builtin_shufflevector(a, b, 1, 3);
#endif
    }
}

// Words of kWide tokens anywhere.
inline void words_of(const int32_t* ids, const Coordinates& at, uint32_t words[kWide]) {
    uint64_t wide[kWide];
    for (int i = 0; i < kWide; ++i) wide[i] = uint64_t(ids[i]);
    vu id, c[1][4];
    std::memcpy(&id, wide, sizeof id);
    c[0][0] = id >> 2;
    philox(c, at);
    for (int i = 0; i < kWide; ++i) words[i] = uint32_t(c[0][wide[i] & 3][i]);
}

}  // namespace xn

#endif  // XLLM_RACE_H
