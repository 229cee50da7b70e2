// Packed weights as bytes: a record (the struct of this very build, without its pointer) beside panels that
// the caller keeps, in a mapped file as a rule. What a record says is laid out anew and compared: no number
// of a file is ever trusted to be an offset.
#include <stddef.h>
#include <string.h>

#include <new>

#include "xllm/pack.h"

namespace xn {
namespace {

constexpr int64_t kRecordBytes = sizeof(xn_matrix);
constexpr uintptr_t kLine = 64;

// Reading a bool that is neither 0 nor 1 is undefined, so its byte is looked at first.
bool is_bool(const unsigned char* record, size_t at) { return record[at] <= 1; }

bool bools_hold(const unsigned char* record) {
    return is_bool(record, offsetof(xn_matrix, half_scales)) && is_bool(record, offsetof(xn_matrix, has_mins)) &&
           is_bool(record, offsetof(xn_matrix, borrowed));
}

}  // namespace
}  // namespace xn

extern "C" {

int64_t xn_matrix_record_bytes(void) { return xn::kRecordBytes; }

int32_t xn_matrix_record(const xn_matrix* matrix, void* record) {
    if (matrix == nullptr || record == nullptr) return XN_ERR_ARGUMENT;
    memcpy(record, matrix, sizeof(xn_matrix));
    auto* bytes = static_cast<unsigned char*>(record);
    memset(bytes + offsetof(xn_matrix, panels), 0, sizeof(matrix->panels));
    bytes[offsetof(xn_matrix, borrowed)] = 0;
    return XN_OK;
}

const void* xn_matrix_panels(const xn_matrix* matrix) { return matrix == nullptr ? nullptr : matrix->panels; }

int32_t xn_matrix_over(
    const void* record, int64_t record_bytes, const void* panels, int64_t panels_bytes, xn_matrix** made) {
    if (record == nullptr || record_bytes != xn::kRecordBytes || panels == nullptr || made == nullptr)
        return XN_ERR_ARGUMENT;
    if (!xn::bools_hold(static_cast<const unsigned char*>(record))) return XN_ERR_ARGUMENT;
    if (reinterpret_cast<uintptr_t>(panels) % xn::kLine != 0) return XN_ERR_ARGUMENT;
    xn_matrix* m = new (std::nothrow) xn_matrix;
    if (m == nullptr) return XN_ERR_MEMORY;
    memcpy(m, record, sizeof(*m));
    // Laid out anew, the record must stand as it was: then every offset in it is one of ours.
    if (!xn::lay_out(m) || memcmp(m, record, sizeof(*m)) != 0 || m->bytes != panels_bytes) {
        delete m;
        return XN_ERR_ARGUMENT;
    }
    m->borrowed = true;  // and only ever read: the memory may be mapped so
    m->panels = static_cast<uint8_t*>(const_cast<void*>(panels));
    *made = m;
    return XN_OK;
}

}  // extern "C"
