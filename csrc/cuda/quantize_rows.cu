// Rows to int8: s = a / 127 and q = rint(x * (127 / a)) for the largest magnitude a of a row, or of each 32
// k, after RMSNorm where there is one.  memlm/ops/_matmul.py, quantize_activations, is the specification,
// which holds to the last bit without a norm: all steps are single f32 operations, rounded to nearest.
// The squares of a norm are summed in f32 in the order that rows.h says.
//
// A block for each row, a thread for each k.  The 32 k of a group are a warp's lanes, so that their largest
// needs no shared memory.
#include "quantize_rows.h"

#include "magnitude.h"
#include "rows.h"

namespace memlm::cuda {
namespace {

constexpr int kGroup = 32;
static_assert(kGroup == kWarp);

// How numbers whose largest magnitude is given are rounded.
struct Rounding {
  float inverse, scale;  // inverse 0: all codes are 0

  MEMLM_DEVICE explicit Rounding(uint32_t largest) {
    const float amax = as_float(largest), factor = 127 / amax;
    // A number so small that its inverse is Inf counts as 0.
    const bool finite = largest < kInfinity, usable = finite && magnitude(factor) < kInfinity;
    inverse = usable ? factor : 0;
    scale = !finite ? as_float(0x7fc00000) : usable ? amax / 127 : 0;
  }

  MEMLM_DEVICE int8_t code(float x) const {
    return static_cast<int8_t>(inverse != 0 ? round_int(x * inverse) : 0);
  }
};

template <class T, bool whole>
__global__ void __launch_bounds__(kRowThreads)
    quantize_rows_kernel(const T* x, int64_t x_stride, const T* norm, float eps, int k, QuantizedRows to) {
  x += block_x() * x_stride;
  int8_t* const codes = to.codes + block_x() * to.stride;
  float* const scales = to.scales + block_x() * to.row_step;
  const float factor = norm ? norm_factor(x, k, eps) : 1;
  auto value = [&](int i) { return i < k ? to_float(x[i]) * factor * (norm ? to_float(norm[i]) : 1) : 0; };
  const int end = static_cast<int>(to.stride);

  if (whole) {
    uint32_t largest = 0;
    for (int i = thread(); i < k; i += kRowThreads) {
      const uint32_t one = magnitude(value(i));
      largest = one > largest ? one : largest;
    }
    largest = largest_of_warp(largest);
    uint32_t* const of_warps = shared<uint32_t>();
    MEMLM_SYNC_THREADS();  // the norm's sums are read
    if (lane() == 0) of_warps[warp()] = largest;
    MEMLM_SYNC_THREADS();
    largest = largest_of_warp(of_warps[lane() % (kRowThreads / kWarp)]);
    const Rounding rounding(largest);
    if (thread() == 0) scales[0] = rounding.scale;
    for (int i = thread(); i < end; i += kRowThreads) codes[i] = rounding.code(value(i));
    return;
  }
  for (int start = warp() * kGroup; start < end; start += kRowThreads) {
    const int i = start + lane();
    const float v = value(i);
    const Rounding rounding(largest_of_warp(magnitude(v)));
    if (lane() == 0 && start < k) scales[start / kGroup * to.group_step] = rounding.scale;
    if (i < end) codes[i] = rounding.code(v);
  }
}

template <class T>
memlm_status begin(int64_t m, int64_t k, const void* x, int64_t x_stride, const void* norm, float eps,
                   bool whole, const QuantizedRows& to, void* stream) {
  const auto kernel = whole ? &quantize_rows_kernel<T, true> : &quantize_rows_kernel<T, false>;
  return started(launch(kernel, {m}, kRowThreads, kRowThreads / kWarp * 4, stream, static_cast<const T*>(x),
                        x_stride, static_cast<const T*>(norm), eps, k, to));
}

}  // namespace

memlm_status begin_quantize_rows(int64_t m, int64_t k, const void* x, int64_t x_stride, memlm_dtype dtype,
                                 const void* norm, float norm_eps, int64_t x_group, const QuantizedRows& to,
                                 void* stream) {
  const auto run = dtype == MEMLM_F32 ? &begin<float> : dtype == MEMLM_F16 ? &begin<f16> : &begin<bf16>;
  return run(m, k, x, x_stride, norm, norm_eps, x_group == 0, to, stream);
}

}  // namespace memlm::cuda

using namespace memlm;
using namespace memlm::cuda;

memlm_status memlm_cuda_quantize_rows(int64_t m, int64_t k, const void* x, int64_t x_stride,
                                      memlm_dtype dtype, const void* norm, float norm_eps, int64_t x_group,
                                      int8_t* codes, float* scales, memlm_cuda_queue* queue) {
  MEMLM_CHECK(m >= 0 && m <= INT32_MAX && k >= 1 && k <= INT32_MAX - kRowThreads,
              "m, k: got %lld, %lld, accepted are 0 and 1 to 2^31 - 257", static_cast<long long>(m),
              static_cast<long long>(k));
  MEMLM_CHECK(!m || (x && codes && scales), "x, codes, scales: NULL");
  MEMLM_CHECK(x_stride >= k, "x_stride: got %lld, at least k = %lld is needed",
              static_cast<long long>(x_stride), static_cast<long long>(k));
  MEMLM_CHECK(x_group == 0 || x_group == kGroup, "x_group: got %lld, accepted are 0 and 32",
              static_cast<long long>(x_group));
  MEMLM_PASS(check_arrays(dtype, "x, norm", {x, norm}));
  MEMLM_PASS(check_arrays(MEMLM_F32, "scales", {scales}));
  Gpu gpu;
  MEMLM_PASS(find_gpu(MEMLM_F16, &gpu));
  if (!m) return MEMLM_OK;
  const QuantizedRows to = {codes, k, scales, x_group ? ceil_div(k, kGroup) : 1, 1};
  return begin_quantize_rows(m, k, x, x_stride, dtype, norm, norm_eps, x_group, to, queue->stream);
}
