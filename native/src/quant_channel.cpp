// Float32 weights → 8-bit codes with one scale per output channel, at load.
#include <math.h>

#include <algorithm>
#include <memory>
#include <new>

#include "xllm/pack.h"
#include "xllm/threads.h"

namespace xn {
namespace {

void quantize_channel(const float* from, int64_t count, int8_t* codes, float* scale) {
    float largest = 0.0f;
    for (int64_t k = 0; k < count; ++k) largest = std::max(largest, fabsf(from[k]));
    *scale = largest / 127.0f;
    for (int64_t k = 0; k < count; ++k) {
        const float code = *scale > 0.0f ? nearbyintf(from[k] / *scale) : 0.0f;
        codes[k] = static_cast<int8_t>(std::clamp(code, -127.0f, 127.0f));
    }
}

}  // namespace
}  // namespace xn

extern "C" int32_t xn_quantize_w8a8(
    xn_pool* pool, const float* rows, int64_t num_out, int64_t num_in, xn_matrix** made) {
    if (rows == nullptr || num_out < 1 || num_in < 1) return XN_ERR_ARGUMENT;
    std::unique_ptr<int8_t[]> codes(new (std::nothrow) int8_t[num_out * num_in]);
    std::unique_ptr<float[]> scales(new (std::nothrow) float[num_out]);
    if (codes == nullptr || scales == nullptr) return XN_ERR_MEMORY;
    xn::parallel(pool, num_out, [&](int64_t n, int32_t) {
        xn::quantize_channel(rows + n * num_in, num_in, codes.get() + n * num_in, scales.get() + n);
    });
    return xn_pack_w8a8(pool, codes.get(), scales.get(), num_out, num_in, made);
}
