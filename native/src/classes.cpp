// The switches of classes.h.
#include "xllm/classes.h"

namespace xn {

int max_tile_rows(const xn_matrix& m, int panels) {
    switch (m.weight_class) {
        case XN_BF16: return max_bf16_rows(panels);
        case XN_W8A8: return max_channel_rows(panels);
        default: return max_group_rows(panels);
    }
}

TileFn tile_of(const xn_matrix& m, int rows, int panels) {
    switch (m.weight_class) {
        case XN_BF16: return bf16_tile(rows, panels);
        case XN_W8A8: return channel_tile(rows, panels);
        case XN_W8G16: return halves_tile(rows, panels);
        default: return group_tile(rows, panels, m.weight_class == XN_W4G32);
    }
}

int64_t rounded_bytes(const xn_matrix& m) {
    switch (m.weight_class) {
        case XN_BF16: return 2 * m.padded_in;
        case XN_W8A8: return m.padded_in + static_cast<int64_t>(sizeof(ChannelInfo));
        default: return m.padded_in + m.num_scales() * static_cast<int64_t>(sizeof(GroupInfo));
    }
}

void round_row(const xn_matrix& m, const float* x, uint8_t* row) {
    switch (m.weight_class) {
        case XN_BF16: return to_bf16_row(x, m.num_in, m.padded_in, row);
        case XN_W8A8: return to_channel_row(x, m.num_in, m.padded_in, m.zero, row);
        case XN_W8G16: return to_halves_row(x, m.num_in, m.padded_in, m.zero, row);
        default: return to_group_row(x, m.num_in, m.padded_in, m.zero, row);
    }
}

}  // namespace xn
