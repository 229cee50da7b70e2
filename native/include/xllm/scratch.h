// Memory that a thread keeps between calls. What must not live here: anything that outlives a call's use.
#ifndef XLLM_SCRATCH_H
#define XLLM_SCRATCH_H

#include <stdlib.h>

#include <algorithm>

#include "xllm/pack.h"

namespace xn {

// Grows, never shrinks; what it held is lost when it grows. Declared thread_local by its users.
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

}  // namespace xn

#endif  // XLLM_SCRATCH_H
