// Rows of activations rounded to int8.
#ifndef MEMLM_CUDA_QUANTIZE_ROWS_H_
#define MEMLM_CUDA_QUANTIZE_ROWS_H_

#include "host.h"

namespace memlm::cuda {

// Where codes and scales go: those of row i from codes + i * stride, zeros from k to the stride; its
// scale for group g to scales[i * row_step + g * group_step].
struct QuantizedRows {
  int8_t* codes;
  int64_t stride;
  float* scales;
  int64_t row_step, group_step;
};

// memlm_quantize_rows of checked arguments.  m is at least 1.
memlm_status begin_quantize_rows(int64_t m, int64_t k, const void* x, int64_t x_stride, memlm_dtype dtype,
                                 const void* norm, float norm_eps, int64_t x_group, const QuantizedRows& to,
                                 void* stream);

}  // namespace memlm::cuda

#endif
