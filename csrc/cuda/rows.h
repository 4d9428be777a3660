// Rows of activations made ready for a product: normalised, and laid so that 16 bytes may be read at once.
#ifndef MEMLM_CUDA_ROWS_H_
#define MEMLM_CUDA_ROWS_H_

#include "host.h"

namespace memlm::cuda {

constexpr int kRowThreads = 256;  // of a block, which has one row

// 1 / sqrt(mean(x^2) + eps) of the block's row x [k].  Squares are summed in f32: each thread's in the order
// of k, then those of lanes, then those of warps.  Uses kRowThreads / kWarp floats of shared memory, which
// other threads may still read behind it.
template <class T>
MEMLM_DEVICE float norm_factor(const T* x, int k, float eps) {
  float squares = 0;
  for (int i = thread(); i < k; i += kRowThreads) squares = fma_f32(to_float(x[i]), to_float(x[i]), squares);
  for (int mask = kWarp / 2; mask; mask /= 2) squares += shuffle_xor(squares, mask);
  float* const of_warps = shared<float>();
  if (lane() == 0) of_warps[warp()] = squares;
  MEMLM_SYNC_THREADS();
  squares = 0;
  for (int i = 0; i < kRowThreads / kWarp; i++) squares += of_warps[i];
  return rsqrt_approx(squares / static_cast<float>(k) + eps);
}

// Elements from one row to the next of what ready_rows writes.
inline int64_t ready_stride(int64_t k) { return round_up(k, 8); }

// out [m, k] = x, or with a norm x / sqrt(mean(x^2) + eps) * norm, rounded to dtype; 0 from k to the stride.
memlm_status ready_rows(const memlm_matmul_args* args, int64_t k, void* out, void* stream);

// Whether the rows of x can be read as they are.
inline bool are_ready(const memlm_matmul_args* args, int64_t k) {
  return !args->norm && k % 8 == 0 && args->x_stride % 8 == 0 && is_aligned(args->x, 16);
}

}  // namespace memlm::cuda

#endif
