// What this machine can do at most: bytes read from memory, bf16 and int8 dot products from registers.
// A program of its own, compiled by native_step.py for exactly this machine; not part of any library.
// Prints one JSON object. Each figure is the best and the median of many short runs, all threads started together.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <sys/mman.h>
#include <thread>
#include <vector>

using Clock = std::chrono::steady_clock;

namespace {

constexpr size_t kBytes = size_t(256) << 20;  // of each thread; far beyond any last-level cache share
constexpr int kRuns = 15;

std::atomic<uint64_t> sink{0};

struct Stats {
  double best, median;
};

// `work` runs on each thread and returns the units it did. Threads wait for each other, so that
// the slowest one's time is the time of all.
Stats rate(int threads, const std::function<double(int)>& work) {
  std::vector<double> rates;
  for (int run = 0; run < kRuns; ++run) {
    std::atomic<int> ready{0};
    std::vector<double> units(threads);
    std::vector<Clock::time_point> begins(threads), ends(threads);
    std::vector<std::thread> pool;
    for (int t = 0; t < threads; ++t)
      pool.emplace_back([&, t] {
        ready.fetch_add(1);
        while (ready.load() < threads) std::this_thread::yield();
        begins[t] = Clock::now();
        units[t] = work(t);
        ends[t] = Clock::now();
      });
    for (auto& thread : pool) thread.join();
    double all = 0;
    for (double u : units) all += u;
    const auto span = *std::max_element(ends.begin(), ends.end()) - *std::min_element(begins.begin(), begins.end());
    rates.push_back(all / std::chrono::duration<double>(span).count());
  }
  std::sort(rates.begin(), rates.end());
  return {rates.back(), rates[rates.size() / 2]};
}

double read_once(const uint64_t* data) {
  uint64_t a[32] = {};
  for (size_t i = 0; i < kBytes / 8; i += 32) {
    __builtin_prefetch(data + i + 512);
    __builtin_prefetch(data + i + 520);
    __builtin_prefetch(data + i + 528);
    __builtin_prefetch(data + i + 536);
    for (int j = 0; j < 32; ++j) a[j] += data[i + j];
  }
  uint64_t sum = 0;
  for (uint64_t part : a) sum += part;
  sink += sum;
  return double(kBytes);
}

// 24 accumulators hide the latency; nothing is loaded. Operands are zeroes: no cost depends on values.
#define TWENTY_FOUR(OP)                                                                              \
  OP(8) OP(9) OP(10) OP(11) OP(12) OP(13) OP(14) OP(15) OP(16) OP(17) OP(18) OP(19) OP(20) OP(21)    \
  OP(22) OP(23) OP(24) OP(25) OP(26) OP(27) OP(28) OP(29) OP(30) OP(31)
#define CLOBBERS                                                                                     \
  "xmm0", "xmm1", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm16",     \
      "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25", "xmm26",      \
      "xmm27", "xmm28", "xmm29", "xmm30", "xmm31"
#define ZERO(n) "vpxord %%zmm" #n ", %%zmm" #n ", %%zmm" #n "\n\t"
#define BF16(n) "vdpbf16ps %%zmm0, %%zmm1, %%zmm" #n "\n\t"
#define INT8(n) "vpdpbusd %%zmm0, %%zmm1, %%zmm" #n "\n\t"

[[maybe_unused]] constexpr long kLoops = 5'000'000;

#ifdef __AVX512BF16__
double bf16(int) {
  long n = kLoops;
  asm volatile(ZERO(0) ZERO(1) TWENTY_FOUR(ZERO) "1:\n\t" TWENTY_FOUR(BF16) "dec %0\n\tjnz 1b\n\t"
               : "+r"(n)::CLOBBERS, "cc");
  return double(kLoops) * 24 * 64;  // 32 products and 32 sums each
}
#endif
#ifdef __AVX512VNNI__
double int8(int) {
  long n = kLoops;
  asm volatile(ZERO(0) ZERO(1) TWENTY_FOUR(ZERO) "1:\n\t" TWENTY_FOUR(INT8) "dec %0\n\tjnz 1b\n\t"
               : "+r"(n)::CLOBBERS, "cc");
  return double(kLoops) * 24 * 128;
}
#endif

void tell(const char* name, int max_threads, const std::function<double(int)>& work, const char* end) {
  std::printf("\"%s\": {", name);
  for (int t = 1; t <= max_threads; t *= 2) {
    const Stats found = rate(t, work);
    std::printf("%s\"%d\": {\"best\": %.2f, \"median\": %.2f}", t > 1 ? ", " : "", t, found.best * 1e-9,
                found.median * 1e-9);
  }
  std::printf("}%s", end);
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 2;
  std::vector<uint64_t*> data;
  for (int t = 0; t < threads; ++t) {
    void* room = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (room == MAP_FAILED) return 1;
    madvise(room, kBytes, MADV_HUGEPAGE);
    auto* words = static_cast<uint64_t*>(room);
    for (size_t i = 0; i < kBytes / 8; ++i) words[i] = i;
    data.push_back(words);
  }
  std::printf("{");
#ifdef __AVX512BF16__
  tell("bf16_gflop_s", threads, bf16, ", ");
#endif
#ifdef __AVX512VNNI__
  tell("int8_gop_s", threads, int8, ", ");
#endif
  tell("read_gb_s", threads, [&](int t) { return read_once(data[t]); }, "}\n");
  return 0;
}
