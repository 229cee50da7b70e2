// Every kernel of one library, run whole and in pieces, with one thread and with three: a row has one set of bits.
//
// Usage: rows [library]; without one, the library is linked into the program. Prints a digest of the bits of
// every kernel, so that runs on different processors can be compared, and ends with 1 at the first difference.
// It needs neither Python nor an instruction beyond the baseline: it runs in emulators and under sanitisers.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "xllm_native.h"

namespace {

using Floats = std::vector<float>;
using Make = int32_t (*)(xn_pool*, const float*, int64_t, int64_t, xn_matrix**);
using MakeCodes = int32_t (*)(
    xn_pool*, const int8_t*, const float*, const float*, int64_t, int64_t, xn_matrix**);

void* g_library = nullptr;

[[noreturn]] void fail(const char* what, const char* more) {
    std::fprintf(stderr, "%s: %s\n", what, more);
    std::exit(1);
}

void* symbol(const char* name) { return dlsym(g_library, name); }

#define CALL(name) (reinterpret_cast<decltype(&name)>(required(#name)))

void* required(const char* name) {
    void* found = symbol(name);
    if (found == nullptr) fail(name, "not in the library");
    return found;
}

void must(int32_t code, const char* what) {
    if (code != XN_OK) fail(what, "refused");
}

// Sums of uniforms: no libm, whose last bit may depend on the processor.
Floats noise(size_t count, uint64_t seed) {
    Floats made(count);
    uint64_t state = seed * 0x9e3779b97f4a7c15u + 1;
    for (float& value : made) {
        float sum = 0;
        for (int i = 0; i < 4; i++) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            sum += static_cast<float>(static_cast<int32_t>(state >> 40) - (1 << 23)) / (1 << 23);
        }
        value = sum;
    }
    return made;
}

void print_digest(const std::string& name, const void* bytes, size_t count) {
    uint64_t hash = 0xcbf29ce484222325u;
    for (size_t i = 0; i < count; i++) {
        hash = (hash ^ static_cast<const unsigned char*>(bytes)[i]) * 0x100000001b3u;
    }
    std::printf("%s %016llx\n", name.c_str(), static_cast<unsigned long long>(hash));
}

// Memory on cache lines, exactly as long as asked, so that a sanitiser sees the first byte beyond.
struct Bytes {
    explicit Bytes(size_t count) : data(static_cast<uint8_t*>(std::aligned_alloc(64, (count + 63) / 64 * 64))) {
        if (data == nullptr) fail("test", "no memory");
        std::memset(data, 0xff, count);  // pages with NaN in them
    }
    Bytes(const Bytes&) = delete;
    Bytes& operator=(const Bytes&) = delete;
    ~Bytes() { std::free(data); }
    uint8_t* data;
};

// A call over rows [first, first + count) that leaves its result at those rows of `y`.
using OverRows = std::function<void(xn_pool* pool, int64_t first, int64_t count, float* y)>;

struct Pools {
    xn_pool* one = nullptr;  // all on the caller
    xn_pool* three = nullptr;
};

void compare(const std::string& name, const Floats& found, const Floats& expected) {
    if (std::memcmp(found.data(), expected.data(), sizeof(float) * expected.size()) != 0) {
        fail(name.c_str(), "bits depend on the company of a row or on threads");
    }
}

void check(const std::string& name, const Pools& pools, int64_t rows, int64_t width, const OverRows& call) {
    Floats whole(rows * width);
    call(pools.one, 0, rows, whole.data());
    for (int64_t piece : {int64_t{1}, int64_t{2}, int64_t{5}, int64_t{16}, rows}) {
        for (xn_pool* pool : {pools.one, pools.three}) {
            Floats found(rows * width, -1.0f);
            for (int64_t first = 0; first < rows; first += piece) {
                const int64_t count = first + piece < rows ? piece : rows - first;
                call(pool, first, count, found.data() + first * width);
            }
            compare(name, found, whole);
        }
    }
    print_digest(name, whole.data(), sizeof(float) * whole.size());
}

constexpr int64_t kRows = 37, kOut = 86, kIn = 352;

xn_matrix* packed(const std::string& kind) {
    const Floats weights = noise(kOut * kIn, 1);
    xn_matrix* made = nullptr;
    if (kind == "w8g16") {
        std::vector<int8_t> codes(kOut * kIn);
        for (size_t i = 0; i < codes.size(); i++) codes[i] = static_cast<int8_t>(31 * weights[i]);
        const Floats scales = noise(kOut * kIn / 16, 2), mins = noise(kOut * kIn / 16, 3);
        const auto make = reinterpret_cast<MakeCodes>(symbol("xn_pack_w8g16"));
        if (make == nullptr) return nullptr;
        must(make(nullptr, codes.data(), scales.data(), mins.data(), kOut, kIn, &made), "packing");
        return made;
    }
    const std::string name = (kind == "bf16" ? "xn_pack_" : "xn_quantize_") + kind;
    const auto make = reinterpret_cast<Make>(symbol(name.c_str()));
    if (make == nullptr) return nullptr;
    must(make(nullptr, weights.data(), kOut, kIn, &made), "packing");
    return made;
}

void check_products(const Pools& pools, const std::string& kind) {
    xn_matrix* matrix = packed(kind);
    if (matrix == nullptr) return;  // a class of other versions
    const Floats x = noise(kRows * kIn, 4), bias = noise(kOut, 5), residual = noise(kRows * kOut, 6);
    const Floats norm = noise(kIn, 7);
    const int64_t stride = CALL(xn_rounded_stride)(matrix);
    check("linear " + kind, pools, kRows, kOut, [&](xn_pool* pool, int64_t first, int64_t count, float* y) {
        must(CALL(xn_linear)(pool, matrix, &x[first * kIn], count, kIn, bias.data(), y, kOut), "xn_linear");
    });
    check("normed " + kind, pools, kRows, kOut, [&](xn_pool* pool, int64_t first, int64_t count, float* y) {
        Bytes rounded(count * stride);
        const int32_t code = CALL(xn_rms_norm_rounded)(
            pool, matrix, &x[first * kIn], count, kIn, norm.data(), 1e-6f, 0.0f, rounded.data);
        must(code, "xn_rms_norm_rounded");
        must(CALL(xn_linear_fused)(
                 pool, matrix, nullptr, rounded.data, count, 0, bias.data(), XN_ADD_RESIDUAL,
                 &residual[first * kOut], kOut, y, kOut),
             "xn_linear_fused");
    });
    for (const int32_t epilogue : {XN_SILU_MUL, XN_GELU_TANH_MUL}) {
        const std::string name = (epilogue == XN_SILU_MUL ? "silu " : "gelu ") + kind;
        check(name, pools, kRows, kOut / 2, [&](xn_pool* pool, int64_t first, int64_t count, float* y) {
            must(CALL(xn_linear_fused)(
                     pool, matrix, &x[first * kIn], nullptr, count, kIn, nullptr, epilogue, nullptr, 0, y,
                     kOut / 2),
                 "xn_linear_fused");
        });
    }
    CALL(xn_matrix_free)(matrix);
}

void check_elementwise(const Pools& pools) {
    constexpr int64_t width = 101;
    const Floats x = noise(kRows * 2 * width, 8), weight = noise(width, 9);
    check("norm", pools, kRows, width, [&](xn_pool* pool, int64_t first, int64_t count, float* y) {
        must(CALL(xn_rms_norm)(
                 pool, &x[first * width], count, 1, width, width, weight.data(), 1e-6f, 1.0f, y, width),
             "xn_rms_norm");
    });
    check("softcap", pools, kRows, width, [&](xn_pool* pool, int64_t first, int64_t count, float* y) {
        must(CALL(xn_softcap)(pool, &x[first * width], width, count, width, 1.5f, y, width), "xn_softcap");
    });
    check("gated", pools, kRows, width, [&](xn_pool* pool, int64_t first, int64_t count, float* y) {
        must(CALL(xn_gelu_tanh_mul)(pool, &x[first * 2 * width], 2 * width, count, width, y, width), "gated");
    });
    const Floats angles = noise(kRows * 40, 10);
    check("rope", pools, kRows, 160, [&](xn_pool* pool, int64_t first, int64_t count, float* y) {
        must(CALL(xn_rope)(
                 pool, &x[first * 160], 160, count, 2, 40, &angles[first * 40], &angles[first * 40], 40, y, 160),
             "xn_rope");
    });
}

constexpr int64_t kHeads = 4, kKvHeads = 2, kHeadDim = 80, kLayers = 2, kPositions = 150;
constexpr int64_t kWidthQ = kHeads * kHeadDim, kWidthKv = kKvHeads * kHeadDim;
constexpr int64_t kBlocks = 3;  // of a sequence

struct Inputs {
    Floats q = noise(2 * kPositions * kWidthQ, 11), k = noise(2 * kPositions * kWidthKv, 12),
           v = noise(2 * kPositions * kWidthKv, 13);
};

// One step: `count` rows of each of `sequences` from `start` on. Inputs and y hold all rows of the first
// sequence, then those of the second.
void attend(
    xn_pool* pool, const Inputs& in, int64_t sequences, int64_t start, int64_t count, int64_t window, int64_t kind,
    uint8_t* pages, Floats& y) {
    const int64_t table[2 * kBlocks] = {4, 0, 3, 1, 5, 2};
    xn_span spans[2];
    Floats q, k, v;
    const auto add = [](Floats& to, const Floats& from, int64_t row, int64_t rows, int64_t width) {
        to.insert(to.end(), from.begin() + row * width, from.begin() + (row + rows) * width);
    };
    for (int64_t s = 0; s < sequences; s++) {
        spans[s] = xn_span{s * count, count, start, s * kBlocks, -1};
        add(q, in.q, s * kPositions + start, count, kWidthQ);
        add(k, in.k, s * kPositions + start, count, kWidthKv);
        add(v, in.v, s * kPositions + start, count, kWidthKv);
    }
    xn_attention_plan plan{};
    plan.spans = spans;
    plan.num_spans = sequences;
    plan.page_table = table;
    plan.num_heads = kHeads;
    plan.num_kv_heads = kKvHeads;
    plan.head_dim = kHeadDim;
    plan.num_layers = kLayers;
    plan.window = window;
    plan.kv_class = kind;
    std::vector<int32_t> items(3 * sequences * (count + 1));
    plan.num_items = CALL(xn_attention_items)(&plan, items.data(), sequences * (count + 1));
    plan.items = items.data();
    Floats out(sequences * count * kWidthQ);
    must(CALL(xn_attention)(
             pool, &plan, pages, 1, q.data(), kWidthQ, k.data(), kWidthKv, v.data(), kWidthKv, 0.1f, 0.0f,
             out.data(), kWidthQ),
         "xn_attention");
    for (int64_t s = 0; s < sequences; s++) {
        std::memcpy(
            &y[(s * kPositions + start) * kWidthQ], &out[s * count * kWidthQ], sizeof(float) * count * kWidthQ);
    }
}

void check_attention(const Pools& pools, const std::string& name, int64_t window, int64_t kind) {
    const int64_t values = XN_PAGE_SIZE * kHeadDim;
    const int64_t tile = kind == XN_KV_INT8 ? values + XN_PAGE_SIZE * int64_t{sizeof(float)} : 2 * values;
    const size_t bytes = 2 * kBlocks * 2 * kLayers * kKvHeads * tile;
    const Inputs in;
    const auto run = [&](xn_pool* pool, int64_t sequences, int64_t piece) {
        Bytes pages(bytes);
        Floats y(2 * kPositions * kWidthQ);
        for (int64_t start = 0; start < kPositions; start += piece) {
            const int64_t count = start + piece < kPositions ? piece : kPositions - start;
            attend(pool, in, sequences, start, count, window, kind, pages.data, y);
        }
        return y;
    };
    const Floats both = run(pools.one, 2, kPositions);
    for (const int64_t piece : {int64_t{1}, int64_t{7}, int64_t{64}, kPositions}) {
        compare(name, run(pools.three, 2, piece), both);
    }
    Floats alone = run(pools.one, 1, kPositions);
    std::memcpy(
        &alone[kPositions * kWidthQ], &both[kPositions * kWidthQ], sizeof(float) * kPositions * kWidthQ);
    compare(name + " in company", alone, both);
    print_digest(name, both.data(), sizeof(float) * both.size());
}

void check_sampler(const Pools& pools) {
    constexpr int64_t vocab = 4093, num_rows = 6;
    Floats logits = noise(num_rows * vocab, 14);
    for (float& value : logits) value *= 4;
    xn_sample_row rows[num_rows];
    for (int64_t i = 0; i < num_rows; i++) {
        rows[i] = xn_sample_row{};
        rows[i].logits = &logits[i * vocab];
        rows[i].seed = 77 + i;
        rows[i].top_p = i % 2 ? 0.9 : 1.0;
        rows[i].min_p = i == 4 ? 0.01 : 0.0;
        rows[i].temperature = i == 0 ? 0.0f : 0.5f + 0.25f * static_cast<float>(i);
        rows[i].top_k = i == 3 ? 40 : 0;
        rows[i].offset = static_cast<uint32_t>(3 * i);
        rows[i].num_choices = 2;
        rows[i].first = 2 * i;
    }
    const uint32_t choices[2 * num_rows] = {0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1};
    const auto run = [&](xn_pool* pool, int64_t piece) {
        Bytes workspace(CALL(xn_sample_bytes)(pool, vocab));
        std::vector<int64_t> tokens(2 * num_rows, -1);
        int32_t status[num_rows];
        for (int64_t i = 0; i < num_rows; i += piece) {
            const int32_t code =
                CALL(xn_sample)(pool, rows + i, piece, vocab, choices, tokens.data(), status + i, workspace.data);
            must(code, "xn_sample");
        }
        for (const int32_t code : status) must(code, "a sampled row");
        return tokens;
    };
    const std::vector<int64_t> whole = run(pools.one, num_rows);
    for (const int64_t piece : {int64_t{1}, int64_t{2}, num_rows}) {
        if (run(pools.three, piece) != whole) fail("sampler", "tokens depend on company or threads");
    }
    print_digest("sampler", whole.data(), sizeof(int64_t) * whole.size());
}

}  // namespace

int main(int argc, char** argv) {
    g_library = dlopen(argc > 1 ? argv[1] : nullptr, RTLD_NOW);
    if (g_library == nullptr) fail("library", dlerror());
    std::printf("isa %s\n", CALL(xn_isa)());
    std::fflush(stdout);
    Pools pools;
    pools.three = CALL(xn_pool_create)(3);
    if (pools.three == nullptr) fail("pool", "no threads");
    for (const char* kind : {"bf16", "w8g32", "w4g32", "w8g16", "w8a8"}) check_products(pools, kind);
    check_elementwise(pools);
    check_attention(pools, "attention", 0, XN_KV_BF16);
    check_attention(pools, "attention window", 70, XN_KV_BF16);
    check_attention(pools, "attention codes", 0, XN_KV_INT8);
    check_sampler(pools);
    CALL(xn_pool_destroy)(pools.three);
    return 0;
}
