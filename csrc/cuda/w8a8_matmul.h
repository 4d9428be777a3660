// y = x W^T + bias over 8-bit weights and rows of int8 that are ready.
#ifndef MEMLM_CUDA_W8A8_MATMUL_H_
#define MEMLM_CUDA_W8A8_MATMUL_H_

#include "product.h"

namespace memlm::cuda {

constexpr int64_t kMostIntK = 65536;  // of int32 sums

// Rows of codes, 16-byte aligned and a multiple of 16 bytes apart, and a scale for each.
struct ReadyRows {
  const int8_t* codes;
  int64_t stride;
  const float* scales;
};

// The product, y f32, of checked arguments; x and its stride are not looked at.  workspace: the plan's.
memlm_status multiply_ready(const memlm_packed* w, const memlm_matmul_args* args, const ReadyRows& x,
                            const Gpu& gpu, char* workspace, void* stream);

}  // namespace memlm::cuda

#endif
