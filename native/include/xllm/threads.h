// The pool's C++ face: `parallel` for lambdas. What must not live here: any notion of an operation.
#ifndef XLLM_THREADS_H
#define XLLM_THREADS_H

#include <type_traits>

#include "xllm_native.h"

namespace xn {

// Calls body(item, worker) for every item in [0, num_items); see xn_parallel.
template <class Body>
inline void parallel(xn_pool* pool, int64_t num_items, Body&& body) {
    using Plain = std::remove_reference_t<Body>;
    xn_parallel(
        pool, num_items,
        [](void* context, int64_t item, int32_t worker) { (*static_cast<Plain*>(context))(item, worker); },
        const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace xn

#endif  // XLLM_THREADS_H
