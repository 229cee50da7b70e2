// Steps in a row: while one runs, the next is ready, and it begins without anybody being asked.
//
// A queue's thread is the caller (worker 0) of the pool for all it runs. Jobs run in the order in which they came,
// one after the other, so they may share arena, carry and control; what differs between two that are under way is
// their own: the xn_step and the arrays of the job. What must not live here: operations, and what they read.
#include <pthread.h>

#include <cstring>
#include <new>

#include "xllm/clock.h"
#include "xllm/step.h"

namespace {

constexpr uint64_t kDepth = 2;

struct Locked {
    explicit Locked(pthread_mutex_t& m) : mutex(m) { pthread_mutex_lock(&mutex); }
    Locked(const Locked&) = delete;
    Locked& operator=(const Locked&) = delete;
    ~Locked() { pthread_mutex_unlock(&mutex); }
    pthread_mutex_t& mutex;
};

}  // namespace

// Everything but `pool` and `thread` is guarded by `mutex`. A job itself belongs to the thread from its start to
// its end, but for the times when it rests: then to who waits.
struct xn_queue {
    xn_pool* pool = nullptr;
    pthread_t thread;
    pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t for_thread = PTHREAD_COND_INITIALIZER;
    pthread_cond_t for_caller = PTHREAD_COND_INITIALIZER;

    xn_job* jobs[kDepth] = {};
    bool follows[kDepth] = {};  // whether another job was under way when this one came
    uint64_t submitted = 0, ended = 0, collected = 0;
    int32_t last = XN_OK;     // how the job before the running one ended
    int32_t resting = XN_OK;  // why the running job waits for the caller
    int32_t verdict = XN_OK;  // what the caller said: XN_OK = go on, else it ends with this
    bool closing = false;

    // From the thread: waits until the caller says how to go on. XN_OK, or the code with which to end.
    int32_t rest(int32_t why) {
        const Locked locked(mutex);
        resting = why;
        pthread_cond_signal(&for_caller);
        while (resting != XN_OK && !closing) pthread_cond_wait(&for_thread, &mutex);
        const int32_t said = resting != XN_OK ? int32_t{XN_DROPPED} : verdict;
        resting = XN_OK;
        return said;
    }

    void work();
};

namespace {

// The tokens that the job before has drawn, in the places that were left open for them.
int32_t resolve(const xn_job& job) {
    for (int64_t i = 0; i < job.num_pending; i++) {
        const xn_pending& open = job.pending[i];
        if (open.row < 0 || open.row >= job.step->num_rows) return XN_ERR_ARGUMENT;
        if (open.token < 0 || open.token >= job.num_drawn) return XN_ERR_ARGUMENT;
        // The ids are a part of the words, which are the step's own.
        const int64_t at = job.step->ids[XN_IDS_TOKENS] - job.step->words.data;
        job.step->words.data[at + open.row] = job.drawn[open.token];
    }
    return XN_OK;
}

int32_t forward(xn_queue& queue, xn_job& job) {
    int64_t position = 0;
    for (;;) {
        int32_t code = xn_program_run(
            queue.pool, job.nodes, job.num_nodes, job.step, 0, job.arena, job.carry, job.control, job.stamps,
            &position);
        if (code != XN_STOPPED) return code;
        code = queue.rest(XN_STOPPED);
        if (code != XN_OK) return code;
    }
}

int32_t run_slice(xn_queue& queue, xn_job& job, const xn_slice& slice) {
    int64_t position = 0;
    const int32_t code = xn_program_run(
        queue.pool, slice.nodes, slice.num_nodes, nullptr, slice.num_rows, job.arena, slice.hidden, nullptr, nullptr,
        &position);
    if (code != XN_OK) return code;
    if (slice.asks != 0) return queue.rest(XN_ASKS);
    return xn_sample(
        queue.pool, slice.draws, slice.num_draws, job.vocab, job.choices, job.tokens, slice.status, job.workspace);
}

int32_t run(xn_queue& queue, xn_job& job) {
    for (int64_t i = 0; i < job.num_copies; i++)
        std::memcpy(job.copies[i].to, job.copies[i].from, static_cast<size_t>(job.copies[i].bytes));
    int32_t code = resolve(job);
    if (code == XN_OK && job.num_nodes > 0) code = forward(queue, job);
    for (int64_t i = 0; i < job.num_slices && code == XN_OK; i++) code = run_slice(queue, job, job.slices[i]);
    return code;
}

void* thread_main(void* argument) {
    pthread_setname_np(pthread_self(), "xllm-steps");
    static_cast<xn_queue*>(argument)->work();
    return nullptr;
}

}  // namespace

void xn_queue::work() {
    pthread_mutex_lock(&mutex);
    while (!closing) {
        if (ended == submitted) {
            pthread_cond_wait(&for_thread, &mutex);
            continue;
        }
        xn_job& job = *jobs[ended % kDepth];
        const bool runs = !follows[ended % kDepth] || last == XN_OK;
        pthread_mutex_unlock(&mutex);
        int32_t code = XN_DROPPED;
        if (runs) {
            job.began_ns = xn::now_ns();
            code = run(*this, job);
            job.ended_ns = xn::now_ns();
        }
        pthread_mutex_lock(&mutex);
        job.code = last = code;
        ended++;
        pthread_cond_signal(&for_caller);
    }
    pthread_mutex_unlock(&mutex);
}

extern "C" {

xn_queue* xn_queue_create(xn_pool* pool) {
    xn_queue* queue = new (std::nothrow) xn_queue;
    if (queue == nullptr) return nullptr;
    queue->pool = pool;
    if (pthread_create(&queue->thread, nullptr, thread_main, queue) == 0) return queue;
    delete queue;
    return nullptr;
}

void xn_queue_destroy(xn_queue* queue) {
    if (queue == nullptr) return;
    {
        const Locked locked(queue->mutex);
        queue->closing = true;
        pthread_cond_signal(&queue->for_thread);
    }
    pthread_join(queue->thread, nullptr);
    delete queue;
}

int32_t xn_queue_submit(xn_queue* queue, xn_job* job) {
    const Locked locked(queue->mutex);
    const uint64_t under_way = queue->submitted - queue->collected;
    if (under_way == kDepth) return XN_ERR_ARGUMENT;
    queue->jobs[queue->submitted % kDepth] = job;
    queue->follows[queue->submitted % kDepth] = under_way > 0;
    queue->submitted++;
    pthread_cond_signal(&queue->for_thread);
    return XN_OK;
}

int32_t xn_queue_wait(xn_queue* queue) {
    const Locked locked(queue->mutex);
    if (queue->collected == queue->submitted) return XN_ERR_ARGUMENT;
    while (queue->ended == queue->collected && queue->resting == XN_OK)
        pthread_cond_wait(&queue->for_caller, &queue->mutex);
    if (queue->ended == queue->collected) return queue->resting;
    return queue->jobs[queue->collected++ % kDepth]->code;
}

int32_t xn_queue_go_on(xn_queue* queue, int32_t code) {
    const Locked locked(queue->mutex);
    if (queue->resting == XN_OK) return XN_ERR_ARGUMENT;
    queue->verdict = code;
    queue->resting = XN_OK;
    pthread_cond_signal(&queue->for_thread);
    return XN_OK;
}

}  // extern "C"
