// The queue of one library under load: chains of steps whose ids are what the step before has drawn, with rests,
// failures and ends at every point. The tokens are those of the same steps run by hand.
//
// Usage: queue [library]. Ends with 1 at the first difference; what it is for are the sanitisers of data races.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "xllm_native.h"

namespace {

constexpr int64_t kVocab = 67, kWidth = 64, kRows = 5, kSteps = 40, kRoom = kRows * (kWidth > kVocab ? kWidth : kVocab);

void* g_library = nullptr;

[[noreturn]] void fail(const char* what) {
    std::fprintf(stderr, "queue: %s\n", what);
    std::exit(1);
}

void* required(const char* name) {
    void* found = dlsym(g_library, name);
    if (found == nullptr) fail(name);
    return found;
}

#define CALL(name) (reinterpret_cast<decltype(&name)>(required(#name)))

void expect(int32_t code, int32_t expected, const char* what) {
    if (code != expected) fail(what);
}

xn_matrix* packed() {
    std::vector<float> rows(kVocab * kWidth);
    uint32_t state = 1;
    for (float& value : rows) {
        state = state * 1664525u + 1013904223u;
        value = static_cast<float>(static_cast<int32_t>(state >> 8) - (1 << 23)) / (1 << 23);
    }
    xn_matrix* made = nullptr;
    expect(CALL(xn_pack_bf16)(nullptr, rows.data(), kVocab, kWidth, &made), XN_OK, "packing");
    return made;
}

// "Model": the id's embedding is the hidden state, the table is the head. The stop word is read after it.
struct Model {
    xn_matrix* table = packed();
    xn_node forward[2] = {}, head[1] = {};
    float arena[kRoom], carry[kRoom];
    xn_control control{};
    std::vector<uint8_t> workspace;

    explicit Model(xn_pool* pool) : workspace(CALL(xn_sample_bytes)(pool, kVocab)) {
        forward[0].op = XN_OP_EMBEDDING;
        forward[0].weight = table;
        forward[0].to = xn_place{XN_IN_CARRY, 0, kWidth};
        forward[1].op = XN_OP_END_LAYER;
        head[0].op = XN_OP_LINEAR;
        head[0].weight = table;
        head[0].x = xn_place{XN_IN_CARRY, 0, kWidth};
        head[0].to = xn_place{XN_IN_ARENA, 0, kVocab};
    }
    ~Model() { CALL(xn_matrix_free)(table); }
};

// What differs between two jobs under way. A page is one number, which every step copies from its own place.
struct Step {
    xn_step* step = CALL(xn_step_create)(nullptr, 0);
    xn_sample_row draws[kRows] = {};
    uint32_t choices[kRows] = {};
    int32_t status[kRows] = {};
    int64_t tokens[kRows] = {}, stamps[2] = {};
    xn_pending pending[kRows];
    xn_slice slice{};
    xn_copy copy{};
    xn_job job{};

    Step() = default;
    Step(const Step&) = delete;
    Step& operator=(const Step&) = delete;
    ~Step() { CALL(xn_step_destroy)(step); }

    void fill(Model& model, int64_t number, const Step* before, bool asks) {
        std::vector<int64_t> words;
        for (int64_t i = 0; i < kRows; i++) words.insert(words.end(), {1, number, 0});
        for (int64_t i = 0; i < kRows; i++) words.push_back(before == nullptr ? 11 * i + 1 : -1);
        const auto count = static_cast<int64_t>(words.size());
        expect(CALL(xn_step_set)(step, words.data(), count, kRows), XN_OK, "a step");
        for (int64_t i = 0; i < kRows; i++) {
            draws[i] = xn_sample_row{};
            draws[i].logits = model.arena + i * kVocab;
            draws[i].seed = 5 + i;
            draws[i].top_p = 1.0;
            draws[i].temperature = 1.0f;
            draws[i].offset = static_cast<uint32_t>(number);
            draws[i].num_choices = 1;
            draws[i].first = i;
            pending[i] = xn_pending{i, i};
            tokens[i] = 0;
        }
        slice = xn_slice{model.head, 1, kRows, reinterpret_cast<uint8_t*>(model.carry), draws, kRows, status, asks};
        job = xn_job{};
        job.step = step;
        job.nodes = model.forward;
        job.num_nodes = 2;
        job.arena = reinterpret_cast<uint8_t*>(model.arena);
        job.carry = reinterpret_cast<uint8_t*>(model.carry);
        job.control = &model.control;
        job.stamps = stamps;
        job.slices = &slice;
        job.num_slices = 1;
        job.choices = choices;
        job.vocab = kVocab;
        job.workspace = model.workspace.data();
        job.tokens = tokens;
        if (before == nullptr) return;
        job.pending = pending;
        job.num_pending = kRows;
        job.drawn = before->tokens;
        job.num_drawn = kRows;
    }

    void draw(xn_pool* pool, Model& model) {
        const int32_t code =
            CALL(xn_sample)(pool, draws, kRows, kVocab, choices, tokens, status, model.workspace.data());
        expect(code, XN_OK, "sampling");
    }
};

std::vector<int64_t> by_hand(xn_pool* pool) {
    Model model(pool);
    std::vector<int64_t> found, ids;
    for (int64_t i = 0; i < kRows; i++) ids.push_back(11 * i + 1);
    for (int64_t number = 0; number < kSteps; number++) {
        Step step;
        step.fill(model, number, nullptr, false);
        expect(CALL(xn_embedding)(pool, model.table, ids.data(), kRows, 0.0f, model.carry, kWidth), XN_OK, "ids");
        const int32_t code = CALL(xn_linear)(
            pool, model.table, model.carry, kRows, kWidth, nullptr, model.arena, kVocab);
        expect(code, XN_OK, "a head");
        step.draw(pool, model);
        ids.assign(step.tokens, step.tokens + kRows);
        found.insert(found.end(), ids.begin(), ids.end());
    }
    return found;
}

// Every third step asks, every fifth stops at its layer.
std::vector<int64_t> in_the_queue(xn_pool* pool) {
    Model model(pool);
    xn_queue* queue = CALL(xn_queue_create)(pool);
    if (queue == nullptr) fail("no queue");
    std::vector<int64_t> found;
    Step steps[3];
    const auto submit = [&](int64_t number) {
        Step& step = steps[number % 3];
        step.fill(model, number, number == 0 ? nullptr : &steps[(number - 1) % 3], number % 3 == 1);
        expect(CALL(xn_queue_submit)(queue, &step.job), XN_OK, "a submit");
    };
    submit(0);
    for (int64_t number = 0; number < kSteps; number++) {
        if (number % 5 == 0) __atomic_store_n(&model.control.stop, 1, __ATOMIC_RELEASE);
        if (number + 1 < kSteps) submit(number + 1);
        Step& step = steps[number % 3];
        int32_t code;
        while ((code = CALL(xn_queue_wait)(queue)) == XN_STOPPED || code == XN_ASKS) {
            if (code == XN_STOPPED) __atomic_store_n(&model.control.stop, 0, __ATOMIC_RELEASE);
            if (code == XN_ASKS) step.draw(pool, model);
            expect(CALL(xn_queue_go_on)(queue, XN_OK), XN_OK, "to go on");
        }
        expect(code, XN_OK, "a step");
        if (step.job.began_ns > step.stamps[1] || step.stamps[1] > step.job.ended_ns) fail("stamps out of order");
        found.insert(found.end(), step.tokens, step.tokens + kRows);
    }
    expect(CALL(xn_queue_wait)(queue), XN_ERR_ARGUMENT, "nothing is under way");
    CALL(xn_queue_destroy)(queue);
    return found;
}

void check_failures(xn_pool* pool) {
    Model model(pool);
    xn_queue* queue = CALL(xn_queue_create)(pool);
    Step first, second, third;
    int64_t from = 7, to = 0;
    first.fill(model, 0, nullptr, false);
    second.fill(model, 1, &first, false);
    second.copy = xn_copy{reinterpret_cast<uint8_t*>(&to), reinterpret_cast<uint8_t*>(&from), sizeof to};
    second.job.copies = &second.copy;
    second.job.num_copies = 1;
    first.job.pending = first.pending;  // of no job
    first.job.num_pending = kRows;
    expect(CALL(xn_queue_submit)(queue, &first.job), XN_OK, "a submit");
    expect(CALL(xn_queue_submit)(queue, &second.job), XN_OK, "a submit");
    expect(CALL(xn_queue_submit)(queue, &third.job), XN_ERR_ARGUMENT, "a third under way");
    expect(CALL(xn_queue_wait)(queue), XN_ERR_ARGUMENT, "a failure");
    expect(CALL(xn_queue_wait)(queue), XN_DROPPED, "the one behind it");
    if (to != 0) fail("a dropped job has copied");
    first.fill(model, 0, nullptr, true);
    expect(CALL(xn_queue_submit)(queue, &first.job), XN_OK, "a submit");
    expect(CALL(xn_queue_wait)(queue), XN_ASKS, "to be asked");
    expect(CALL(xn_queue_go_on)(queue, XN_ERR_MEMORY), XN_OK, "to give up");
    expect(CALL(xn_queue_wait)(queue), XN_ERR_MEMORY, "what was said");
    second.job.num_pending = 0;
    expect(CALL(xn_queue_submit)(queue, &second.job), XN_OK, "a submit");
    expect(CALL(xn_queue_wait)(queue), XN_ERR_ARGUMENT, "an id that is none");
    if (to != 7) fail("a copy was not made");
    CALL(xn_queue_destroy)(queue);
}

// Ends with a job that runs, one that rests, one that was not begun.
void check_ends(xn_pool* pool) {
    for (int rests = 0; rests < 2; rests++) {
        Model model(pool);
        xn_queue* queue = CALL(xn_queue_create)(pool);
        Step first, second;
        first.fill(model, 0, nullptr, rests != 0);
        second.fill(model, 1, &first, false);
        expect(CALL(xn_queue_submit)(queue, &first.job), XN_OK, "a submit");
        expect(CALL(xn_queue_submit)(queue, &second.job), XN_OK, "a submit");
        if (rests != 0) expect(CALL(xn_queue_wait)(queue), XN_ASKS, "to be asked");
        CALL(xn_queue_destroy)(queue);
    }
}

}  // namespace

int main(int argc, char** argv) {
    g_library = dlopen(argc > 1 ? argv[1] : nullptr, RTLD_NOW);
    if (g_library == nullptr) fail(dlerror());
    const std::vector<int64_t> expected = by_hand(nullptr);
    for (int32_t threads : {1, 3}) {
        xn_pool* pool = CALL(xn_pool_create)(threads);
        if (pool == nullptr) fail("no pool");
        if (in_the_queue(pool) != expected) fail("other tokens than by hand");
        check_failures(pool);
        check_ends(pool);
        CALL(xn_pool_destroy)(pool);
    }
    std::printf("queue: %lld tokens as by hand\n", static_cast<long long>(expected.size()));
    return 0;
}
