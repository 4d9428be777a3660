#include "rows.h"

namespace memlm::cuda {
namespace {

constexpr int kThreads = 256;

// A block for each row.  Squares are summed in f32: each thread's in the order of k, then those of lanes,
// then those of warps.
template <class T>
__global__ void ready_rows_kernel(const T* x, int64_t x_stride, const T* norm, float eps, int k, T* out,
                                  int64_t out_stride) {
  x += block_x() * x_stride;
  out += block_x() * out_stride;
  float factor = 1;
  if (norm) {
    float squares = 0;
    for (int i = thread(); i < k; i += kThreads) squares = fma_f32(to_float(x[i]), to_float(x[i]), squares);
    for (int mask = kWarp / 2; mask; mask /= 2) squares += shuffle_xor(squares, mask);
    float* const of_warps = shared<float>();
    if (lane() == 0) of_warps[warp()] = squares;
    MEMLM_SYNC_THREADS();
    squares = 0;
    for (int i = 0; i < kThreads / kWarp; i++) squares += of_warps[i];
    factor = rsqrt_approx(squares / static_cast<float>(k) + eps);
  }
  for (int i = thread(); i < out_stride; i += kThreads) {
    const float value = i < k ? to_float(x[i]) * factor * (norm ? to_float(norm[i]) : 1) : 0;
    out[i] = from_float<T>(value);
  }
}

template <class T>
memlm_status begin(const memlm_matmul_args* args, int64_t k, void* out, void* stream) {
  return started(launch(&ready_rows_kernel<T>, {args->m}, kThreads, kThreads / kWarp * 4, stream,
                        static_cast<const T*>(args->x), args->x_stride, static_cast<const T*>(args->norm),
                        args->norm_eps, k, static_cast<T*>(out), ready_stride(k)));
}

}  // namespace

memlm_status ready_rows(const memlm_matmul_args* args, int64_t k, void* out, void* stream) {
  return args->dtype == MEMLM_F16 ? begin<f16>(args, k, out, stream) : begin<bf16>(args, k, out, stream);
}

}  // namespace memlm::cuda
