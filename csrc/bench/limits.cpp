// Measures the machine's limits: see memlm_limits.h.
#include "../include/memlm_limits.h"

#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;

// The time that `threads` threads take for work(i), in seconds, from when all have started: the
// shortest of `repeats`.
double shortest(int threads, int repeats, const std::function<void(int)>& work) {
  double best = 1e30;
  for (int r = 0; r < repeats; ++r) {
    std::atomic<int> waiting{threads};
    std::vector<double> starts(threads), ends(threads);
    std::vector<std::thread> pool;
    for (int t = 0; t < threads; ++t)
      pool.emplace_back([&, t] {
        waiting.fetch_sub(1);
        while (waiting.load() > 0) std::this_thread::yield();
        starts[t] = std::chrono::duration<double>(Clock::now().time_since_epoch()).count();
        work(t);
        ends[t] = std::chrono::duration<double>(Clock::now().time_since_epoch()).count();
      });
    for (auto& thread : pool) thread.join();
    double start = starts[0], end = ends[0];
    for (int t = 1; t < threads; ++t) {
      if (starts[t] < start) start = starts[t];
      if (ends[t] > end) end = ends[t];
    }
    if (end - start < best) best = end - start;
  }
  return best;
}

volatile uint64_t g_sink;  // keeps results alive

constexpr int64_t kRounds = 4 << 20;

#if defined(__x86_64__)

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

__attribute__((target("avx2"))) uint64_t read_avx2(const char* p, int64_t bytes) {
  __m256i sums[4] = {};
  for (int64_t i = 0; i + 128 <= bytes; i += 128)
    for (int j = 0; j < 4; ++j)
      sums[j] = _mm256_xor_si256(
          sums[j], _mm256_load_si256(reinterpret_cast<const __m256i*>(p + i + 32 * j)));
  const __m256i all =
      _mm256_xor_si256(_mm256_xor_si256(sums[0], sums[1]), _mm256_xor_si256(sums[2], sums[3]));
  return static_cast<uint64_t>(_mm256_extract_epi64(all, 0) ^ _mm256_extract_epi64(all, 3));
}

// 12 independent chains: an FMA takes 4 cycles, two start in each.  Named variables, because GCC
// keeps an array in memory; the empty asm statements, so that no operation is left out.
#define MEMLM_TWELVE(op) op(0) op(1) op(2) op(3) op(4) op(5) op(6) op(7) op(8) op(9) op(10) op(11)

__attribute__((target("avx2,fma"))) void fma_avx2() {
  const __m256 x = _mm256_set1_ps(0.5f);
#define MEMLM_SET(i) __m256 a##i = x;
#define MEMLM_STEP(i)                  \
  a##i = _mm256_fmadd_ps(a##i, x, x); \
  __asm__ volatile("" : "+x"(a##i));
  MEMLM_TWELVE(MEMLM_SET)
  for (int64_t i = 0; i < kRounds; ++i) {
    MEMLM_TWELVE(MEMLM_STEP)
  }
#undef MEMLM_SET
#undef MEMLM_STEP
}

__attribute__((target("avx2"))) void maddubs_avx2() {
  __m256i x = _mm256_set1_epi8(3);
#define MEMLM_SET(i) __m256i a##i = x;
#define MEMLM_STEP(i)                                           \
  __asm__ volatile("" : "+x"(x)); /* the product is computed anew */ \
  a##i = _mm256_add_epi16(a##i, _mm256_maddubs_epi16(x, x));    \
  __asm__ volatile("" : "+x"(a##i));
  MEMLM_TWELVE(MEMLM_SET)
  for (int64_t i = 0; i < kRounds; ++i) {
    MEMLM_TWELVE(MEMLM_STEP)
  }
#undef MEMLM_SET
#undef MEMLM_STEP
}
#undef MEMLM_TWELVE

#else
bool has_avx2() { return false; }
#endif

uint64_t read_scalar(const char* p, int64_t bytes) {
  const uint64_t* words = reinterpret_cast<const uint64_t*>(p);
  uint64_t sums[8] = {};
  for (int64_t i = 0; i + 8 <= bytes / 8; i += 8)
    for (int j = 0; j < 8; ++j) sums[j] ^= words[i + j];
  uint64_t all = 0;
  for (uint64_t sum : sums) all ^= sum;
  return all;
}

void fma_scalar() {
  float a[16];
  for (float& v : a) v = 0.5f;
  for (int64_t i = 0; i < kRounds; ++i)
    for (int j = 0; j < 16; ++j) {
      a[j] = a[j] * 0.5f + 0.5f;
      __asm__ volatile("" : "+m"(a[j]));
    }
}

}  // namespace

double memlm_limit_dram_gbps(int threads, int64_t bytes, int huge_pages, int repeats) {
  constexpr int64_t kHuge = 2 << 20;
  bytes = (bytes + kHuge - 1) / kHuge * kHuge;
  void* base = mmap(nullptr, bytes + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                    -1, 0);
  if (base == MAP_FAILED) return 0;
  char* p = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(base) + kHuge - 1) / kHuge * kHuge);
  madvise(p, bytes, huge_pages ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
  for (int64_t i = 0; i < bytes; i += 4096) p[i] = static_cast<char>(i >> 12 | 1);
  const int64_t share = bytes / threads / 4096 * 4096;
  const double seconds = shortest(threads, repeats, [&](int t) {
#if defined(__x86_64__)
    if (has_avx2()) {
      g_sink = read_avx2(p + t * share, share);
      return;
    }
#endif
    g_sink = read_scalar(p + t * share, share);
  });
  munmap(base, bytes + kHuge);
  return static_cast<double>(share) * threads / seconds / 1e9;
}

double memlm_limit_f32_gmacs(int threads, int repeats) {
  double lanes = 16;
  const double seconds = shortest(threads, repeats, [&](int) {
#if defined(__x86_64__)
    if (has_avx2()) return fma_avx2();
#endif
    fma_scalar();
  });
  if (has_avx2()) lanes = 12 * 8;
  return lanes * kRounds * threads / seconds / 1e9;
}

double memlm_limit_i8_gmacs(int threads, int repeats) {
#if defined(__x86_64__)
  if (has_avx2()) {
    const double seconds = shortest(threads, repeats, [](int) { maddubs_avx2(); });
    return 12.0 * 32 * kRounds * threads / seconds / 1e9;
  }
#endif
  (void)threads, (void)repeats;
  return 0;
}
