// A fixed pool of workers that neither burn cores when idle nor wait for one another at full barriers.
//
// A job is a number of items behind one atomic ticket; whoever is awake takes the next. A worker that is
// asleep or descheduled when a job starts is never waited for: only items somebody has taken are. So a
// third busy thread on the machine costs its share of the cores and nothing more.
#include "xllm/threads.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <new>

#include "xllm/clock.h"

using xn::now_ns;

namespace {

constexpr int kMaxThreads = 256;
constexpr int64_t kMaxItems = int64_t{1} << 30;  // of one ticket; longer jobs are run in pieces
constexpr int64_t kDefaultSpinNs = 10'000;

// Set on whoever runs items: a nested job runs where it is, under the same worker number.
thread_local bool t_inside = false;
thread_local int32_t t_worker = 0;

void futex_wait(std::atomic<uint32_t>* word, uint32_t expected) {
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, expected, nullptr, nullptr, 0);
}

void futex_wake(std::atomic<uint32_t>* word, int count) {
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, count, nullptr, nullptr, 0);
}

void pause_briefly() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    asm volatile("" ::: "memory");
#endif
}

// Until `ready()` or the time is up; the clock is read rarely, a read costs as much as a few pauses.
template <class Ready>
bool spin(int64_t limit_ns, Ready ready) {
    if (ready()) return true;
    const int64_t end = now_ns() + limit_ns;
    do {
        for (int i = 0; i < 16; ++i) {
            pause_briefly();
            if (ready()) return true;
        }
    } while (now_ns() < end);
    return false;
}

struct Start {
    xn_pool* pool;
    int32_t worker;
};

}  // namespace

struct xn_pool {
    // Written by the caller while no item is outstanding, read by whoever holds one: the ticket orders both.
    xn_item_fn fn = nullptr;
    void* context = nullptr;
    int64_t first = 0;

    alignas(64) std::atomic<uint64_t> ticket{0};  // number of items << 32 | next item
    alignas(64) std::atomic<uint32_t> done{0};    // items finished; the caller sleeps on it
    std::atomic<uint32_t> caller_sleeps{0};
    alignas(64) std::atomic<uint32_t> generation{0};  // workers sleep on it
    std::atomic<int32_t> num_sleeping{0};
    std::atomic<bool> stop{false};
    std::atomic<int64_t> spin_ns{kDefaultSpinNs};

    int32_t num_threads = 1;
    pthread_t threads[kMaxThreads];
    Start starts[kMaxThreads];

    // Returns how many items this thread finished. A ticket taken late is either spent (its job is over
    // and the increment is lost with the next store) or a valid item of the next job: both are fine.
    uint32_t take_items(int32_t worker) {
        uint32_t count = 0;
        for (;;) {
            const uint64_t mine = ticket.fetch_add(1, std::memory_order_acq_rel);
            const uint64_t item = mine & 0xffffffffu;
            if (item >= mine >> 32) return count;
            fn(context, first + static_cast<int64_t>(item), worker);
            ++count;
            // Told at once when it was the last: the caller may be waiting for exactly this item, and a
            // job must not stay open while this thread looks for more.
            if (item + 1 == mine >> 32) {
                finish(count);
                count = 0;
            }
        }
    }

    void finish(uint32_t count) {
        if (count == 0) return;
        done.fetch_add(count);
        if (caller_sleeps.load() != 0) futex_wake(&done, 1);
    }

    void work(int32_t worker) {
        uint32_t seen = 0;
        t_inside = true;
        t_worker = worker;
        while (!stop.load(std::memory_order_acquire)) {
            finish(take_items(worker));
            const auto changed = [&] { return generation.load(std::memory_order_acquire) != seen; };
            if (!spin(spin_ns.load(std::memory_order_relaxed), changed)) {
                num_sleeping.fetch_add(1);
                while (!changed()) futex_wait(&generation, seen);
                num_sleeping.fetch_sub(1);
            }
            seen = generation.load(std::memory_order_acquire);
        }
    }

    void announce(int count) {
        generation.fetch_add(1);
        if (num_sleeping.load() > 0) futex_wake(&generation, count);
    }

    void run(int64_t start, uint32_t num_items) {
        first = start;
        done.store(0, std::memory_order_relaxed);
        ticket.store(uint64_t{num_items} << 32, std::memory_order_release);
        announce(static_cast<int>(num_items) - 1);
        finish(take_items(0));
        const auto all_done = [&] { return done.load(std::memory_order_acquire) == num_items; };
        if (spin(spin_ns.load(std::memory_order_relaxed), all_done)) return;
        // Somebody holds an item and does not run: give up this core, he may need it.
        caller_sleeps.store(1);
        for (uint32_t d = done.load(); d != num_items; d = done.load()) futex_wait(&done, d);
        caller_sleeps.store(0);
    }
};

namespace {

void* thread_main(void* argument) {
    const Start* start = static_cast<Start*>(argument);
    pthread_setname_np(pthread_self(), "xllm-native");
    start->pool->work(start->worker);
    return nullptr;
}

}  // namespace

extern "C" {

xn_pool* xn_pool_create(int32_t num_threads) {
    if (num_threads < 1 || num_threads > kMaxThreads) return nullptr;
    xn_pool* pool = new (std::nothrow) xn_pool;
    if (pool == nullptr) return nullptr;
    for (; pool->num_threads < num_threads; ++pool->num_threads) {
        const int32_t worker = pool->num_threads;
        pool->starts[worker] = Start{pool, worker};
        if (pthread_create(&pool->threads[worker], nullptr, thread_main, &pool->starts[worker]) != 0) {
            xn_pool_destroy(pool);
            return nullptr;
        }
    }
    return pool;
}

void xn_pool_destroy(xn_pool* pool) {
    if (pool == nullptr) return;
    pool->stop.store(true);
    pool->announce(INT_MAX);
    for (int32_t worker = 1; worker < pool->num_threads; ++worker) pthread_join(pool->threads[worker], nullptr);
    delete pool;
}

int32_t xn_pool_size(const xn_pool* pool) { return pool == nullptr ? 1 : pool->num_threads; }

void xn_pool_set_spin(xn_pool* pool, int32_t microseconds) {
    if (pool != nullptr && microseconds >= 0) pool->spin_ns.store(int64_t{microseconds} * 1000);
}

void xn_parallel(xn_pool* pool, int64_t num_items, xn_item_fn fn, void* context) {
    if (pool == nullptr || pool->num_threads == 1 || num_items <= 1 || t_inside) {
        for (int64_t item = 0; item < num_items; ++item) fn(context, item, t_worker);
        return;
    }
    t_inside = true;
    pool->fn = fn;
    pool->context = context;
    for (int64_t start = 0; start < num_items; start += kMaxItems) {
        const int64_t rest = num_items - start;
        pool->run(start, static_cast<uint32_t>(rest < kMaxItems ? rest : kMaxItems));
    }
    t_inside = false;
}

}  // extern "C"
