// The monotonic clock, the one that Python's time.monotonic reads. What must not live here: what is timed.
#ifndef XLLM_CLOCK_H
#define XLLM_CLOCK_H

#include <stdint.h>
#include <time.h>

namespace xn {

inline int64_t now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return int64_t{t.tv_sec} * 1'000'000'000 + t.tv_nsec;
}

}  // namespace xn

#endif  // XLLM_CLOCK_H
