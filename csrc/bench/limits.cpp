// Measures the machine's limits: see memlm_limits.h.
#include "../include/memlm_limits.h"

#include <sys/mman.h>

#include <string.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>

#define MEMLM_ISA limits
#include "../cpu/tile_unit.h"
#elif defined(__aarch64__)
#include <arm_neon.h>
#include <sys/auxv.h>
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

// MEMLM_CHAINS' name() runs kRounds steps of kChains independent chains a = step(a, x), enough to
// hide an operation's 4 or 5 cycles where two start in each (x86, and AVX2 has 16 registers) or four
// (Arm).  Named variables, because GCC keeps an array in memory; the empty asm statements, so that no
// operation is left out.
#if defined(__x86_64__)
constexpr int kChains = 12;
#define MEMLM_REGISTER(x) "+v"(x)
#define MEMLM_LAST_STEPS(step)
#elif defined(__aarch64__)
constexpr int kChains = 16;
#define MEMLM_REGISTER(x) "+w"(x)
#define MEMLM_LAST_STEPS(step) \
  MEMLM_STEP(a12, step) MEMLM_STEP(a13, step) MEMLM_STEP(a14, step) MEMLM_STEP(a15, step)
#else
constexpr int kChains = 12;
#endif
#define MEMLM_STEP(chain, step)               \
  {                                           \
    auto& a = chain;                          \
    __asm__ volatile("" : MEMLM_REGISTER(x)); \
    a = step;                                 \
    __asm__ volatile("" : MEMLM_REGISTER(a)); \
  }
#define MEMLM_CHAINS(name, isa, type, start, step)                                          \
  __attribute__((target(isa))) void name() {                                                \
    [[maybe_unused]] type x = start, a0 = x, a1 = x, a2 = x, a3 = x, a4 = x, a5 = x, a6 = x, \
                          a7 = x, a8 = x, a9 = x, a10 = x, a11 = x, a12 = x, a13 = x,       \
                          a14 = x, a15 = x;                                                 \
    for (int64_t i = 0; i < kRounds; ++i) {                                                 \
      MEMLM_STEP(a0, step) MEMLM_STEP(a1, step) MEMLM_STEP(a2, step) MEMLM_STEP(a3, step)   \
      MEMLM_STEP(a4, step) MEMLM_STEP(a5, step) MEMLM_STEP(a6, step) MEMLM_STEP(a7, step)   \
      MEMLM_STEP(a8, step) MEMLM_STEP(a9, step) MEMLM_STEP(a10, step) MEMLM_STEP(a11, step) \
      MEMLM_LAST_STEPS(step)                                                                \
    }                                                                                       \
  }

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

bool has_avxvnni() { return has_avx2() && __builtin_cpu_supports("avxvnni"); }

bool has_avx512vnni() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vnni");
}

MEMLM_CHAINS(fma_avx2, "avx2,fma", __m256, _mm256_set1_ps(0.5f), _mm256_fmadd_ps(a, x, x))
MEMLM_CHAINS(fma_avx512, "avx512f", __m512, _mm512_set1_ps(0.5f), _mm512_fmadd_ps(a, x, x))
MEMLM_CHAINS(maddubs_avx2, "avx2", __m256i, _mm256_set1_epi8(3),
             _mm256_add_epi16(a, _mm256_maddubs_epi16(x, x)))
MEMLM_CHAINS(dot_avxvnni, "avx2,avxvnni", __m256i, _mm256_set1_epi32(0x03030303),
             _mm256_dpbusd_avx_epi32(a, x, x))
MEMLM_CHAINS(dot_avx512vnni, "avx512f,avx512vnni", __m512i, _mm512_set1_epi32(0x03030303),
             _mm512_dpbusd_epi32(a, x, x))

// Whether the kernels may use AMX here, which the system has to permit.
bool has_amx() {
  for (const char* const* isa = memlm_isas(); *isa; ++isa)
    if (!strcmp(*isa, "amx")) return true;
  return false;
}

// Products of whole tiles, 16 x 16 sums of 64 each: 12 of them in four chains for each 64 rounds.
constexpr int kMacsAmx = 16 * 16 * 64 / 64;
void dot_amx() {
  using namespace memlm::limits;
  const TileUnit unit;
  alignas(64) static const char ones[kTileBytes] = {1};
  tile_load<4>(ones);
  tile_load<5>(ones);
  for (int64_t i = 0; i < kRounds / 64; ++i)
    for (int j = 0; j < kChains / 4; ++j) {
      tile_dot_s8<0, 4, 5>();
      tile_dot_s8<1, 4, 5>();
      tile_dot_s8<2, 4, 5>();
      tile_dot_s8<3, 4, 5>();
    }
}

#elif defined(__aarch64__)

bool has_dotprod() { return getauxval(AT_HWCAP) & HWCAP_ASIMDDP; }
bool has_i8mm() { return getauxval(AT_HWCAP2) & HWCAP2_I8MM; }

MEMLM_CHAINS(fma_neon, "arch=armv8-a", float32x4_t, vdupq_n_f32(0.5f), vfmaq_f32(a, x, x))
MEMLM_CHAINS(dot_neon, "arch=armv8.2-a+dotprod", int32x4_t, vdupq_n_s32(0x03030303),
             vdotq_s32(a, vreinterpretq_s8_s32(x), vreinterpretq_s8_s32(x)))
MEMLM_CHAINS(mmla_neon, "arch=armv8.2-a+i8mm", int32x4_t, vdupq_n_s32(0x03030303),
             vmmlaq_s32(a, vreinterpretq_s8_s32(x), vreinterpretq_s8_s32(x)))

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
  float a[kChains];
  for (float& v : a) v = 0.5f;
  for (int64_t i = 0; i < kRounds; ++i)
    for (int j = 0; j < kChains; ++j) {
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

// Multiply-adds per second, 10^9, of run, which does kRounds times so many of them in each chain.
static double gmacs(int threads, int repeats, int lanes, void (*run)()) {
  const double seconds = shortest(threads, repeats, [run](int) { run(); });
  return 1.0 * kChains * lanes * kRounds * threads / seconds / 1e9;
}

double memlm_limit_f32_gmacs(int threads, int repeats) {
#if defined(__x86_64__)
  if (has_avx512vnni()) return gmacs(threads, repeats, 16, fma_avx512);
  if (has_avx2()) return gmacs(threads, repeats, 8, fma_avx2);
#elif defined(__aarch64__)
  return gmacs(threads, repeats, 4, fma_neon);
#endif
  return gmacs(threads, repeats, 1, fma_scalar);
}

double memlm_limit_i8_gmacs(int threads, int repeats) {
#if defined(__x86_64__)
  if (has_amx()) return gmacs(threads, repeats, kMacsAmx, dot_amx);
  if (has_avx512vnni()) return gmacs(threads, repeats, 64, dot_avx512vnni);
  if (has_avxvnni()) return gmacs(threads, repeats, 32, dot_avxvnni);
  if (has_avx2()) return gmacs(threads, repeats, 32, maddubs_avx2);
#elif defined(__aarch64__)
  if (has_i8mm()) return gmacs(threads, repeats, 32, mmla_neon);
  if (has_dotprod()) return gmacs(threads, repeats, 16, dot_neon);
#endif
  (void)threads, (void)repeats;
  return 0;
}
