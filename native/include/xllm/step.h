// One step as programs read it. What must not live here: nodes, memory of activations.
#ifndef XLLM_STEP_H
#define XLLM_STEP_H

#include <cstdlib>

#include "xllm_native.h"

namespace xn {

constexpr int64_t kMaxGroups = 16;

// Memory that grows and is never given back before the end; its content is lost when it grows.
template <class T>
struct Grown {
    T* data = nullptr;
    int64_t capacity = 0;

    bool fit(int64_t count) {
        if (count <= capacity) return true;
        int64_t wanted = 64;
        while (wanted < count) wanted *= 2;
        std::free(data);
        data = static_cast<T*>(std::malloc(wanted * sizeof(T)));
        capacity = data == nullptr ? 0 : wanted;
        return data != nullptr;
    }
    ~Grown() { std::free(data); }
};

}  // namespace xn

struct xn_step {
    int64_t num_groups = 0;
    xn_kv_group groups[xn::kMaxGroups];
    int64_t num_rows = 0, num_logit_rows = 0;  // of the step that is set; 0 before the first
    xn::Grown<int64_t> words, positions, logit_rows;
    xn::Grown<xn_span> spans[xn::kMaxGroups];
    xn::Grown<int32_t> items[xn::kMaxGroups];
    xn_attention_plan plans[xn::kMaxGroups];
    const int64_t* ids[3] = {nullptr, nullptr, nullptr};
};

#endif  // XLLM_STEP_H
