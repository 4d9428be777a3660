// The C ABI: checks arguments, chooses the instruction set, calls its kernels.
#include "dispatch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "../formats.h"
#include "threads.h"

#if defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace memlm {
namespace {

thread_local char g_error[256] = "";

struct Candidate {
  const Kernels* kernels;
  bool (*runs_here)();
};

}  // namespace

bool cpu_expands_bytes() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512vbmi2");
#else
  return false;
#endif
}

namespace {

#if defined(__x86_64__)

// These also check that the system saves the registers (XGETBV).
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

bool has_avxvnni() { return has_avx2() && __builtin_cpu_supports("avxvnni"); }

bool has_avx512vnni() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}

// CPUID says what the CPU has; Linux wants to be asked before a process uses tile registers.
bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if ((d & (kBf16 | kTile | kInt8)) != (kBf16 | kTile | kInt8)) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return has_avx512vnni() && __builtin_cpu_supports("avx512bf16") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

#endif

const Candidate kCandidates[] = {
#if defined(__x86_64__)
    {&amx::kernels, has_amx},
    {&avx512vnni::kernels, has_avx512vnni},
    {&avxvnni::kernels, has_avxvnni},
    {&avx2::kernels, has_avx2},
#elif defined(__aarch64__)  // what the kernel reports, it also saves
    {&neon_i8mm::kernels,
     [] {
       return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) && (getauxval(AT_HWCAP2) & HWCAP2_I8MM);
     }},
    {&neon_dotprod::kernels, [] { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }},
#endif
    {&scalar::kernels, [] { return true; }},
};
constexpr int kCount = sizeof kCandidates / sizeof kCandidates[0];

// Names of what runs here, best first, and the kernels in use.
struct Choice {
  const char* names[kCount + 1] = {};
  const Kernels* runnable[kCount] = {};
  std::atomic<const Kernels*> current;

  Choice() {
    int count = 0;
    for (const Candidate& c : kCandidates) {
      if (!c.runs_here()) continue;
      runnable[count] = c.kernels;
      names[count++] = c.kernels->name;
    }
    current = runnable[0];
    const char* wanted = getenv("MEMLM_CPU_ISA");
    if (!wanted || !*wanted) return;
    if (const Kernels* kernels = find(wanted)) {
      current = kernels;
    } else {
      fprintf(stderr, "memlm: MEMLM_CPU_ISA=%s does not run here; using %s\n", wanted, names[0]);
    }
  }
  const Kernels* find(const char* name) const {
    for (int i = 0; names[i]; ++i)
      if (!strcmp(names[i], name)) return runnable[i];
    return nullptr;
  }
};

Choice& choice() {
  static Choice c;
  return c;
}

}  // namespace

const Kernels& kernels() { return *choice().current.load(std::memory_order_relaxed); }

memlm_status fail(memlm_status status, const char* format, ...) {
  va_list args;
  va_start(args, format);
  vsnprintf(g_error, sizeof g_error, format, args);
  va_end(args);
  return status;
}

memlm_status said(memlm_status status) {
  return status == MEMLM_NO_MEMORY ? fail(status, "no memory for the workspace") : status;
}

bool is_dtype(int dtype) {
  return dtype == MEMLM_F32 || dtype == MEMLM_F16 || dtype == MEMLM_BF16;
}

memlm_status check_weight(const memlm_packed* w, int bits) {
  if (!w) return fail(MEMLM_INVALID, "w: is NULL");
  const bool floats = w->pattern == MEMLM_BLOCKS && (bits == 16 || bits == 32);
  if (bits != 2 && bits != 4 && bits != 8 && !floats)
    return fail(MEMLM_INVALID, "bits: got %d, accepted are 2, 4, 8%s", bits,
                w->pattern == MEMLM_BLOCKS ? ", 16, 32" : "");
  if (!w->codes) return fail(MEMLM_INVALID, "codes: is NULL");
  if (!w->scales && !floats) return fail(MEMLM_INVALID, "scales: is NULL");
  if (floats && (w->scales || w->offsets || w->levels))
    return fail(MEMLM_INVALID, "scales, offsets, levels: %d bits are floats, which have none", bits);
  if (w->offsets && bits == 8)
    return fail(MEMLM_INVALID, "offsets: 8-bit weights are symmetric only");
  if (w->levels && (bits != 4 || w->offsets))
    return fail(MEMLM_INVALID, "levels: are for 4 bits without offsets");
  for (int i = 0; w->levels && i < 16; ++i)
    if (!std::isfinite(w->levels[i]))
      return fail(MEMLM_INVALID, "levels: number %d is %g, accepted are finite ones", i, w->levels[i]);
  if (w->scale_dtype != MEMLM_F16 && w->scale_dtype != MEMLM_F32)
    return fail(MEMLM_INVALID, "scale_dtype: got %d, accepted are f16, f32", w->scale_dtype);
  // 2^31 keeps every product of sizes below within 64 bits.
  if (w->n < 1 || w->n > INT32_MAX)
    return fail(MEMLM_INVALID, "n: got %lld, accepted is 1 to 2^31-1", (long long)w->n);
  if (w->k < 1 || w->k > INT32_MAX)
    return fail(MEMLM_INVALID, "k: got %lld, accepted is 1 to 2^31-1", (long long)w->k);
  const int64_t g = w->group;
  if (!(g == 32 || g == 64 || g == 128 || (g == 0 && bits == 8)))
    return fail(MEMLM_INVALID, "group: got %lld, accepted are 32, 64, 128%s", (long long)g,
                bits == 8 ? ", and 0 for one scale per row" : "");
  return w->pattern == MEMLM_DENSE ? MEMLM_OK : check_pattern(*w, bits);
}

memlm_status check_dense(const memlm_packed* w, int bits) {
  if (w && w->pattern != MEMLM_DENSE)
    return fail(MEMLM_INVALID, "pattern: got %d, accepted is dense (0) here", w->pattern);
  return check_weight(w, bits);
}

namespace {

// w [n, k] with rows w_stride apart.
memlm_status check_floats(int64_t n, int64_t k, const void* w, int64_t w_stride, memlm_dtype dtype,
                          int threads) {
  if (n < 1 || n > INT32_MAX)
    return fail(MEMLM_INVALID, "n: got %lld, accepted is 1 to 2^31-1", (long long)n);
  if (k < 1 || k > INT32_MAX)
    return fail(MEMLM_INVALID, "k: got %lld, accepted is 1 to 2^31-1", (long long)k);
  if (!w) return fail(MEMLM_INVALID, "w: is NULL");
  if (w_stride < k)
    return fail(MEMLM_INVALID, "w_stride: got %lld, w has %lld columns", (long long)w_stride,
                (long long)k);
  if (!is_dtype(dtype))
    return fail(MEMLM_INVALID, "dtype: got %d, accepted are f32, f16, bf16", dtype);
  if (threads < 1) return fail(MEMLM_INVALID, "threads: got %d, at least 1 is needed", threads);
  return MEMLM_OK;
}

memlm_status check(const memlm_quantize_args* args) {
  if (!args) return fail(MEMLM_INVALID, "args: is NULL");
  const memlm_quantize_args& a = *args;
  if (memlm_status s = check_floats(a.n, a.k, a.w, a.w_stride, a.dtype, a.threads)) return s;
  const memlm_packed w = {a.codes,  a.scales, a.offsets,   a.scale_dtype, a.n,    a.k,
                          a.group, a.levels, MEMLM_DENSE, nullptr,       nullptr};
  if (memlm_status s = check_weight(&w, a.bits)) return s;
  for (int i = 1; a.levels && i < 16; ++i)
    if (!(a.levels[i - 1] < a.levels[i]))
      return fail(MEMLM_INVALID, "levels: number %d is %g, after %g; they must ascend", i,
                  a.levels[i], a.levels[i - 1]);
  if (a.ternary && (a.bits != 2 || a.offsets))
    return fail(MEMLM_INVALID, "ternary: is for 2 bits without offsets");
  return MEMLM_OK;
}

}  // namespace

memlm_status check_matmul(const memlm_packed& w, const memlm_matmul_args* args) {
  if (!args) return fail(MEMLM_INVALID, "args: is NULL");
  if (args->m < 0 || args->m > INT32_MAX)
    return fail(MEMLM_INVALID, "m: got %lld, accepted is 0 to 2^31-1", (long long)args->m);
  if (!is_dtype(args->dtype))
    return fail(MEMLM_INVALID, "dtype: got %d, accepted are f32, f16, bf16", args->dtype);
  if (args->m > 0 && (!args->x || !args->y))
    return fail(MEMLM_INVALID, "%s: is NULL", args->x ? "y" : "x");
  if (args->swiglu && w.n % (2 * kTileRows))
    return fail(MEMLM_INVALID, "swiglu: n is %lld, accepted are multiples of %d", (long long)w.n,
                2 * kTileRows);
  const int64_t columns = args->swiglu ? w.n / 2 : w.n;
  if (args->x_stride < w.k)
    return fail(MEMLM_INVALID, "x_stride: got %lld, x has %lld columns", (long long)args->x_stride,
                (long long)w.k);
  if (args->residual && args->residual_stride < columns)
    return fail(MEMLM_INVALID, "residual_stride: got %lld, y has %lld columns",
                (long long)args->residual_stride, (long long)columns);
  if (args->y_stride < columns)
    return fail(MEMLM_INVALID, "y_stride: got %lld, y has %lld columns", (long long)args->y_stride,
                (long long)columns);
  if (args->threads < 1)
    return fail(MEMLM_INVALID, "threads: got %d, at least 1 is needed", args->threads);
  return MEMLM_OK;
}

namespace {

memlm_matmul_args with_useful_threads(const memlm_packed& w, memlm_matmul_args args) {
  args.threads = useful_threads(static_cast<double>(args.m) * w.n * w.k, args.threads);
  return args;
}

using Matmul = memlm_status (*)(const memlm_packed&, const memlm_matmul_args&);

memlm_status run_matmul(const memlm_packed* w, int bits, const memlm_matmul_args* args,
                        Matmul Kernels::* kernel) {
  if (memlm_status s = check_dense(w, bits)) return s;
  if (memlm_status s = check_matmul(*w, args)) return s;
  return args->m ? said((kernels().*kernel)(*w, with_useful_threads(*w, *args))) : MEMLM_OK;
}

memlm_status check_x_group(int64_t x_group) {
  if (x_group == 0 || x_group == kActGroup) return MEMLM_OK;
  return fail(MEMLM_INVALID, "x_group: got %lld, accepted are %d and 0 for the whole row",
              (long long)x_group, kActGroup);
}

// int8 codes: -128 has no counterpart, and kernels that work with magnitudes would get it wrong.
memlm_status check_codes(const memlm_matmul_args& args, int64_t k) {
  for (int64_t row = 0; row < args.m; ++row) {
    const int8_t* x = static_cast<const int8_t*>(args.x) + row * args.x_stride;
    bool found = false;
    for (int64_t i = 0; i < k; ++i) found |= x[i] == -128;
    if (found)
      return fail(MEMLM_INVALID, "x: holds -128 in row %lld, accepted are codes of -127 to 127",
                  (long long)row);
  }
  return MEMLM_OK;
}

memlm_status run_rows(const memlm_packed* w, int bits, const int64_t* ids, int64_t row,
                      int64_t count, memlm_dtype dtype, void* out, int threads) {
  if (!is_dtype(dtype))
    return fail(MEMLM_INVALID, "dtype: got %d, accepted are f32, f16, bf16", dtype);
  if (count > 0 && !out) return fail(MEMLM_INVALID, "out: is NULL");
  if (threads < 1) return fail(MEMLM_INVALID, "threads: got %d, at least 1 is needed", threads);
  const Kernels& isa = kernels();
  const int64_t row_bytes = w->k * (dtype == MEMLM_F32 ? 4 : 2);
  parallel_for(count, kTileRows, threads, [&](int64_t begin, int64_t end, int) {
    char* const rows = static_cast<char*>(out) + begin * row_bytes;
    if (w->pattern != MEMLM_DENSE)
      isa.sparse_rows(*w, bits, row + begin, end - begin, dtype, rows);
    else
      isa.dequantize_rows(*w, bits, ids ? ids + begin : nullptr, row + begin, end - begin, dtype, rows);
  });
  return MEMLM_OK;
}

}  // namespace
}  // namespace memlm

using namespace memlm;

const float memlm_nf4_levels[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

const char* memlm_last_error(void) { return g_error; }

memlm_status memlm_w2_matmul(const memlm_packed* w, const memlm_matmul_args* args) {
  return run_matmul(w, 2, args, &Kernels::w2_matmul);
}

memlm_status memlm_w4_matmul(const memlm_packed* w, const memlm_matmul_args* args) {
  return run_matmul(w, 4, args, &Kernels::w4_matmul);
}

memlm_status memlm_w8_matmul(const memlm_packed* w, const memlm_matmul_args* args) {
  return run_matmul(w, 8, args, &Kernels::w8_matmul);
}

memlm_status memlm_w8a8_matmul(const memlm_packed* w, const memlm_matmul_args* args,
                               const float* x_scales, int64_t x_group) {
  constexpr int64_t kMostK = 65536;  // times 255 * 127, what a CPU adds at most: below 2^31
  if (memlm_status s = check_dense(w, 8)) return s;
  if (memlm_status s = check_matmul(*w, args)) return s;
  if (memlm_status s = check_x_group(x_group)) return s;
  if (w->k > kMostK)
    return fail(MEMLM_INVALID, "k: got %lld, accepted is 1 to %lld", (long long)w->k,
                (long long)kMostK);
  if (x_scales && args->norm)
    return fail(MEMLM_INVALID, "norm: x is int8, and only numbers can be normalised");
  if (x_scales)
    if (memlm_status s = check_codes(*args, w->k)) return s;
  if (args->m == 0) return MEMLM_OK;
  return said(kernels().w8a8_matmul(*w, with_useful_threads(*w, *args), x_scales, x_group));
}

memlm_status memlm_quantize_rows(int64_t m, int64_t k, const void* x, int64_t x_stride,
                                 memlm_dtype dtype, const void* norm, float norm_eps, int64_t x_group,
                                 int8_t* codes, float* scales, int threads) {
  if (m < 0 || m > INT32_MAX)
    return fail(MEMLM_INVALID, "m: got %lld, accepted is 0 to 2^31-1", (long long)m);
  if (k < 1 || k > INT32_MAX)
    return fail(MEMLM_INVALID, "k: got %lld, accepted is 1 to 2^31-1", (long long)k);
  if (m > 0 && (!x || !codes || !scales))
    return fail(MEMLM_INVALID, "%s: is NULL", !x ? "x" : !codes ? "codes" : "scales");
  if (x_stride < k)
    return fail(MEMLM_INVALID, "x_stride: got %lld, x has %lld columns", (long long)x_stride,
                (long long)k);
  if (!is_dtype(dtype))
    return fail(MEMLM_INVALID, "dtype: got %d, accepted are f32, f16, bf16", dtype);
  if (threads < 1) return fail(MEMLM_INVALID, "threads: got %d, at least 1 is needed", threads);
  if (memlm_status s = check_x_group(x_group)) return s;
  memlm_matmul_args args = {};
  args.m = m;
  args.x = x;
  args.x_stride = x_stride;
  args.dtype = dtype;
  args.norm = norm;
  args.norm_eps = norm_eps;
  args.threads = threads;
  return m ? said(kernels().quantize_rows(args, k, x_group, codes, scales)) : MEMLM_OK;
}

memlm_status memlm_embedding(const memlm_packed* w, int bits, const int64_t* ids, int64_t count,
                             memlm_dtype dtype, void* out, int threads) {
  if (memlm_status s = check_dense(w, bits)) return s;
  if (count < 0 || (count > 0 && !ids))
    return fail(MEMLM_INVALID, "ids: got %lld at %p", (long long)count, (const void*)ids);
  for (int64_t i = 0; i < count; ++i)
    if (ids[i] < 0 || ids[i] >= w->n)
      return fail(MEMLM_INVALID, "ids: got %lld at position %lld, accepted is 0 to %lld",
                  (long long)ids[i], (long long)i, (long long)w->n - 1);
  return run_rows(w, bits, ids, 0, count, dtype, out, threads);
}

memlm_status memlm_dequantize(const memlm_packed* w, int bits, int64_t row, int64_t rows,
                              memlm_dtype dtype, void* out, int threads) {
  if (memlm_status s = check_weight(w, bits)) return s;
  if (row < 0 || rows < 0 || row > w->n || rows > w->n - row)
    return fail(MEMLM_INVALID, "rows: got %lld from %lld on, W has %lld", (long long)rows,
                (long long)row, (long long)w->n);
  return run_rows(w, bits, nullptr, row, rows, dtype, out, threads);
}

memlm_status memlm_largest_magnitude(int64_t n, int64_t k, const void* w, int64_t w_stride,
                                     memlm_dtype dtype, float* largest, int threads) {
  if (memlm_status s = check_floats(n, k, w, w_stride, dtype, threads)) return s;
  if (!largest) return fail(MEMLM_INVALID, "largest: is NULL");
  const Kernels& isa = kernels();
  const int64_t row_bytes = w_stride * (dtype == MEMLM_F32 ? 4 : 2);
  std::atomic<int32_t> bits{0};
  parallel_for(n, kTileRows, threads, [&](int64_t begin, int64_t end, int) {
    int32_t most = 0;
    const char* row = static_cast<const char*>(w) + begin * row_bytes;
    for (int64_t i = begin; i < end; ++i, row += row_bytes)
      most = std::max(most, isa.largest_bits(row, dtype, k));
    int32_t before = bits;
    while (before < most && !bits.compare_exchange_weak(before, most)) {
    }
  });
  constexpr int32_t kInfinity = 0x7f800000;
  if (bits >= kInfinity) return fail(MEMLM_INVALID, "w: contains NaN or Inf");
  const int32_t found = bits;
  std::memcpy(largest, &found, sizeof found);
  return MEMLM_OK;
}

memlm_status memlm_quantize_weight(const memlm_quantize_args* args) {
  if (memlm_status s = check(args)) return s;
  const Kernels& isa = kernels();
  parallel_for(div_up(args->n, kTileRows), 1, args->threads, [&](int64_t begin, int64_t end, int) {
    isa.quantize_weight(*args, begin, end);
  });
  return MEMLM_OK;
}

const char* memlm_isa(void) { return kernels().name; }

const char* const* memlm_isas(void) { return choice().names; }

int64_t memlm_tile_rows(int fast) {
  return fast ? kernels().tiles_from_fast : kernels().tiles_from_accurate;
}

memlm_status memlm_set_isa(const char* name) {
  const Kernels* found = name ? choice().find(name) : nullptr;
  if (!found)
    return fail(MEMLM_UNSUPPORTED, "isa: %s does not run on this CPU", name ? name : "NULL");
  choice().current = found;
  return MEMLM_OK;
}
