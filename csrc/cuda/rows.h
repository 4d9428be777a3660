// Rows of activations made ready for a product: normalised, and laid so that 16 bytes may be read at once.
#ifndef MEMLM_CUDA_ROWS_H_
#define MEMLM_CUDA_ROWS_H_

#include "host.h"

namespace memlm::cuda {

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
