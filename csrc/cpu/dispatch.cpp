// The C ABI: checks arguments, chooses the instruction set, calls its kernels.
#include "dispatch.h"

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "../formats.h"
#include "threads.h"

namespace memlm {
namespace {

thread_local char g_error[256] = "";

memlm_status fail(memlm_status status, const char* format, ...) {
  va_list args;
  va_start(args, format);
  vsnprintf(g_error, sizeof g_error, format, args);
  va_end(args);
  return status;
}

struct Candidate {
  const Kernels* kernels;
  bool (*runs_here)();
};

const Candidate kCandidates[] = {
#if defined(__x86_64__)  // these also check that the system saves the registers (XGETBV)
    {&avx512vnni::kernels,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512vnni");
     }},
    {&avx2::kernels,
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("f16c");
     }},
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

const Kernels& kernels() { return *choice().current.load(std::memory_order_relaxed); }

bool is_dtype(int dtype) {
  return dtype == MEMLM_F32 || dtype == MEMLM_F16 || dtype == MEMLM_BF16;
}

memlm_status check(const memlm_packed* w, int bits) {
  if (!w) return fail(MEMLM_INVALID, "w: is NULL");
  if (bits != 4 && bits != 8) return fail(MEMLM_INVALID, "bits: got %d, accepted are 4, 8", bits);
  if (!w->codes) return fail(MEMLM_INVALID, "codes: is NULL");
  if (!w->scales) return fail(MEMLM_INVALID, "scales: is NULL");
  if (w->offsets && bits == 8)
    return fail(MEMLM_INVALID, "offsets: 8-bit weights are symmetric only");
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
  return MEMLM_OK;
}

memlm_status check(const memlm_packed& w, const memlm_matmul_args* args) {
  if (!args) return fail(MEMLM_INVALID, "args: is NULL");
  if (args->m < 0 || args->m > INT32_MAX)
    return fail(MEMLM_INVALID, "m: got %lld, accepted is 0 to 2^31-1", (long long)args->m);
  if (!is_dtype(args->dtype))
    return fail(MEMLM_INVALID, "dtype: got %d, accepted are f32, f16, bf16", args->dtype);
  if (args->m > 0 && (!args->x || !args->y))
    return fail(MEMLM_INVALID, "%s: is NULL", args->x ? "y" : "x");
  if (args->norm && args->swiglu)
    return fail(MEMLM_INVALID, "swiglu: together with norm; one of them is accepted");
  const int64_t columns = args->swiglu ? 2 * w.k : w.k;
  if (args->x_stride < columns)
    return fail(MEMLM_INVALID, "x_stride: got %lld, x has %lld columns", (long long)args->x_stride,
                (long long)columns);
  if (args->residual && args->residual_stride < w.n)
    return fail(MEMLM_INVALID, "residual_stride: got %lld, n is %lld",
                (long long)args->residual_stride, (long long)w.n);
  if (args->y_stride < w.n)
    return fail(MEMLM_INVALID, "y_stride: got %lld, n is %lld", (long long)args->y_stride,
                (long long)w.n);
  if (args->threads < 1)
    return fail(MEMLM_INVALID, "threads: got %d, at least 1 is needed", args->threads);
  return MEMLM_OK;
}

using Matmul = memlm_status (*)(const memlm_packed&, const memlm_matmul_args&);

memlm_status run_matmul(const memlm_packed* w, int bits, const memlm_matmul_args* args,
                        Matmul Kernels::* kernel) {
  if (memlm_status s = check(w, bits)) return s;
  if (memlm_status s = check(*w, args)) return s;
  if (args->m == 0) return MEMLM_OK;
  memlm_matmul_args fewer = *args;
  fewer.threads = useful_threads(static_cast<double>(args->m) * w->n * w->k, args->threads);
  const memlm_status status = (kernels().*kernel)(*w, fewer);
  if (status == MEMLM_NO_MEMORY) return fail(status, "no memory for the workspace");
  return status;
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
    isa.dequantize_rows(*w, bits, ids ? ids + begin : nullptr, row + begin, end - begin, dtype,
                        static_cast<char*>(out) + begin * row_bytes);
  });
  return MEMLM_OK;
}

}  // namespace
}  // namespace memlm

using namespace memlm;

const char* memlm_last_error(void) { return g_error; }

memlm_status memlm_w4_matmul(const memlm_packed* w, const memlm_matmul_args* args) {
  return run_matmul(w, 4, args, &Kernels::w4_matmul);
}

memlm_status memlm_w8_matmul(const memlm_packed* w, const memlm_matmul_args* args) {
  return run_matmul(w, 8, args, &Kernels::w8_matmul);
}

memlm_status memlm_embedding(const memlm_packed* w, int bits, const int64_t* ids, int64_t count,
                             memlm_dtype dtype, void* out, int threads) {
  if (memlm_status s = check(w, bits)) return s;
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
  if (memlm_status s = check(w, bits)) return s;
  if (row < 0 || rows < 0 || row > w->n || rows > w->n - row)
    return fail(MEMLM_INVALID, "rows: got %lld from %lld on, W has %lld", (long long)rows,
                (long long)row, (long long)w->n);
  return run_rows(w, bits, nullptr, row, rows, dtype, out, threads);
}

const char* memlm_isa(void) { return kernels().name; }

const char* const* memlm_isas(void) { return choice().names; }

memlm_status memlm_set_isa(const char* name) {
  const Kernels* found = name ? choice().find(name) : nullptr;
  if (!found)
    return fail(MEMLM_UNSUPPORTED, "isa: %s does not run on this CPU", name ? name : "NULL");
  choice().current = found;
  return MEMLM_OK;
}
