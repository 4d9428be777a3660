#include "rows.h"

namespace memlm::cuda {
namespace {

template <class T>
__global__ void ready_rows_kernel(const T* x, int64_t x_stride, const T* norm, float eps, int k, T* out,
                                  int64_t out_stride) {
  x += block_x() * x_stride;
  out += block_x() * out_stride;
  const float factor = norm ? norm_factor(x, k, eps) : 1;
  for (int i = thread(); i < out_stride; i += kRowThreads) {
    const float value = i < k ? to_float(x[i]) * factor * (norm ? to_float(norm[i]) : 1) : 0;
    out[i] = from_float<T>(value);
  }
}

template <class T>
memlm_status begin(const memlm_matmul_args* args, int64_t k, void* out, void* stream) {
  return started(launch(&ready_rows_kernel<T>, {args->m}, kRowThreads, kRowThreads / kWarp * 4, stream,
                        static_cast<const T*>(args->x), args->x_stride, static_cast<const T*>(args->norm),
                        args->norm_eps, k, static_cast<T*>(out), ready_stride(k)));
}

}  // namespace

memlm_status ready_rows(const memlm_matmul_args* args, int64_t k, void* out, void* stream) {
  return args->dtype == MEMLM_F16 ? begin<f16>(args, k, out, stream) : begin<bf16>(args, k, out, stream);
}

}  // namespace memlm::cuda
