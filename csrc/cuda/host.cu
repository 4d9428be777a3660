#include "host.h"

#include <stdarg.h>
#include <stdio.h>

#include <atomic>

namespace memlm {

#ifdef __CUDACC__
bool current_gpu(Gpu* gpu) {
  // Of each device, once asked; a race asks twice for the same.
  constexpr int most = 64;
  static std::atomic<int> known[most][3];
  int device, values[3];
  if (cudaGetDevice(&device) != cudaSuccess || device >= most) return false;
  for (int i = 0; i < 3; i++) values[i] = known[device][i].load(std::memory_order_relaxed);
  if (!values[0] || !values[1] || !values[2]) {
    int major, minor;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&values[1], cudaDevAttrMultiProcessorCount, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&values[2], cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) {
      return false;
    }
    values[0] = 100 * major + 10 * minor;
    for (int i = 0; i < 3; i++) known[device][i].store(values[i], std::memory_order_relaxed);
  }
  *gpu = {values[0], values[1], values[2]};
  return true;
}
#endif

namespace cuda {
namespace {

thread_local char last_error[400];

#ifdef __CUDACC__
constexpr int kCuda = CUDART_VERSION / 1000;  // the runtime's, which is linked into the library
#else
constexpr int kCuda = 0;
#endif

}  // namespace

memlm_status fail(memlm_status status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  return status;
}

memlm_status find_gpu(memlm_dtype dtype, Gpu* gpu) {
  if (!current_gpu(gpu))
    return fail(MEMLM_UNSUPPORTED, "no CUDA device with a driver for CUDA %d or later", kCuda);
  const char* const accepted = "accepted are f16 from compute capability 7.5 on and bf16 from 8.0 on";
  if (gpu->arch < 750) {
    return fail(MEMLM_UNSUPPORTED, "the device has compute capability %d.%d; %s", gpu->arch / 100,
                gpu->arch / 10 % 10, accepted);
  }
  if (dtype == MEMLM_F32 || (dtype == MEMLM_BF16 && gpu->arch < 800)) {
    return fail(MEMLM_UNSUPPORTED, "dtype: got %s on compute capability %d.%d; %s",
                dtype == MEMLM_F32 ? "f32" : "bf16", gpu->arch / 100, gpu->arch / 10 % 10, accepted);
  }
  return MEMLM_OK;
}

memlm_status need(memlm_cuda_queue* queue, int64_t bytes) {
  if (!bytes || (queue->workspace && queue->workspace_bytes >= bytes)) {
    MEMLM_CHECK(!bytes || is_aligned(queue->workspace, 256), "queue: its workspace is not 256-byte aligned");
    return MEMLM_OK;
  }
  queue->workspace_bytes = bytes;
  return fail(MEMLM_NO_MEMORY, "queue: %lld bytes of workspace are needed", static_cast<long long>(bytes));
}

memlm_status check_packed(const memlm_packed* w, int bits) {
  MEMLM_CHECK(w && w->codes && w->scales, "w: it or its codes or scales are NULL");
  MEMLM_CHECK(w->pattern == MEMLM_DENSE, "w: got a sparse matrix, a dense one is accepted");
  return check_values(w, bits);
}

memlm_status check_values(const memlm_packed* w, int bits) {
  MEMLM_CHECK(w->n >= 1 && w->k >= 1, "w: got n = %lld, k = %lld, both must be at least 1",
              static_cast<long long>(w->n), static_cast<long long>(w->k));
  // A tile's codes, 16 rows of at most a byte for each k, are counted in 32 bits; whole matrices in 64.
  constexpr int64_t most_n = INT32_MAX - 63, most_k = INT32_MAX / 16 - 127;
  MEMLM_CHECK(w->n <= most_n && w->k <= most_k, "w: got n = %lld, k = %lld, accepted are up to %lld and %lld",
              static_cast<long long>(w->n), static_cast<long long>(w->k), static_cast<long long>(most_n),
              static_cast<long long>(most_k));
  const int64_t g = w->group;
  MEMLM_CHECK(g == 32 || g == 64 || g == 128 || (g == 0 && bits == 8),
              "w: got a group of %lld, accepted are 32, 64, 128, and 0 for 8 bits",
              static_cast<long long>(g));
  MEMLM_CHECK(w->scale_dtype == MEMLM_F16 || w->scale_dtype == MEMLM_F32, "w: its scales must be f16 or f32");
  MEMLM_CHECK(!w->offsets || bits < 8, "w: 8-bit weights have no offsets");
  MEMLM_CHECK(!w->levels || (bits == 4 && !w->offsets), "w: levels are for 4 bits without offsets");
  MEMLM_CHECK(is_aligned(w->codes, 16) && is_aligned(w->scales, 16) && is_aligned(w->offsets, 16),
              "w: codes, scales and offsets must be 16-byte aligned");
  return MEMLM_OK;
}

memlm_status check_matmul(const memlm_packed* w, const memlm_matmul_args* args, bool int8_x) {
  MEMLM_CHECK(args->m >= 0 && args->m <= INT32_MAX, "m: got %lld, accepted are 0 to 2^31 - 1",
              static_cast<long long>(args->m));
  MEMLM_CHECK(!args->m || (args->x && args->y), "x, y: NULL");
  MEMLM_CHECK(args->x_stride >= w->k, "x_stride: got %lld, at least k = %lld is needed",
              static_cast<long long>(args->x_stride), static_cast<long long>(w->k));
  MEMLM_CHECK(!args->swiglu || w->n % 32 == 0, "swiglu: n / 2 must be a multiple of 16, n is %lld",
              static_cast<long long>(w->n));
  const int64_t columns = args->swiglu ? w->n / 2 : w->n;
  MEMLM_CHECK(args->y_stride >= columns && (!args->residual || args->residual_stride >= columns),
              "y_stride, residual_stride: at least %lld are needed", static_cast<long long>(columns));
  if (!int8_x) MEMLM_PASS(check_arrays(args->dtype, "x", {args->x}));
  return check_arrays(args->dtype, "y, bias, residual, norm",
                      {args->y, args->bias, args->residual, args->norm});
}

memlm_status check_arrays(memlm_dtype dtype, const char* names, std::initializer_list<const void*> arrays) {
  MEMLM_CHECK(dtype == MEMLM_F32 || dtype == MEMLM_F16 || dtype == MEMLM_BF16,
              "dtype: got %d, accepted are 0 to 2", static_cast<int>(dtype));
  for (const void* array : arrays) {
    MEMLM_CHECK(is_aligned(array, bytes_of(dtype)), "%s: not aligned to an element", names);
  }
  return MEMLM_OK;
}

memlm_status check_rows_of(const memlm_packed* w, int64_t row, int64_t rows, memlm_dtype dtype,
                           const void* out) {
  MEMLM_CHECK(w && row >= 0 && rows >= 0 && row <= w->n && rows <= w->n - row,
              "rows: got %lld from %lld on, W has %lld", static_cast<long long>(rows),
              static_cast<long long>(row), static_cast<long long>(w ? w->n : 0));
  MEMLM_PASS(check_arrays(dtype, "out", {out}));
  MEMLM_CHECK(!rows || out, "out: NULL");
  return MEMLM_OK;
}

}  // namespace cuda
}  // namespace memlm

using namespace memlm;

const char* memlm_cuda_last_error(void) { return cuda::last_error; }

memlm_status memlm_cuda_supported(void) {
  Gpu gpu;
  return cuda::find_gpu(MEMLM_F16, &gpu);
}
