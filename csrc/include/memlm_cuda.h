/* memlm's C ABI on NVIDIA GPUs: the functions of memlm.h with another prefix, on device memory.
 *
 * All arrays lie in the memory of the current device; structs, and memlm_packed.levels, in the host's.
 * A function begins its work on a stream and returns at once.  It allocates nothing and waits for
 * nothing, so that it may be captured in a graph.  What differs from memlm.h:
 *
 *   activations are f16, or from compute capability 8.0 on bf16, where nothing else is said
 *   codes lie 16-byte aligned
 *   of sparse matrices starts and places are not checked: they must be as memlm/sparse_formats.py says
 *   `fast` and `threads` are not looked at: products are exact or rounded once to f32, sums are f32
 */
#ifndef MEMLM_CUDA_H_
#define MEMLM_CUDA_H_

#include "memlm.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Where a call does its work. */
typedef struct {
  void* stream;            /* a cudaStream_t; NULL: the default stream */
  void* workspace;         /* device memory, 256-byte aligned, of no other call under way */
  int64_t workspace_bytes; /* of it.  Where they do not suffice, the call does nothing, stores here how
                              many it needs, and returns MEMLM_NO_MEMORY */
} memlm_cuda_queue;

/* What went wrong in this thread's last call that did not return MEMLM_OK. */
MEMLM_API const char* memlm_cuda_last_error(void);

/* MEMLM_OK where the current device can run the kernels; else memlm_cuda_last_error says what is
 * supported. */
MEMLM_API memlm_status memlm_cuda_supported(void);

MEMLM_API memlm_status memlm_cuda_w2_matmul(const memlm_packed* w, const memlm_matmul_args* args,
                                            memlm_cuda_queue* queue);
MEMLM_API memlm_status memlm_cuda_w4_matmul(const memlm_packed* w, const memlm_matmul_args* args,
                                            memlm_cuda_queue* queue);
MEMLM_API memlm_status memlm_cuda_w8_matmul(const memlm_packed* w, const memlm_matmul_args* args,
                                            memlm_cuda_queue* queue);

/* f32, f16 and bf16 on all devices.  -128 in int8 x is a number as others are: nobody looks for it. */
MEMLM_API memlm_status memlm_cuda_w8a8_matmul(const memlm_packed* w, const memlm_matmul_args* args,
                                              const float* x_scales, int64_t x_group,
                                              memlm_cuda_queue* queue);

/* f32, f16 and bf16 on all devices. */
MEMLM_API memlm_status memlm_cuda_quantize_rows(int64_t m, int64_t k, const void* x, int64_t x_stride,
                                                memlm_dtype dtype, const void* norm, float norm_eps,
                                                int64_t x_group, int8_t* codes, float* scales,
                                                memlm_cuda_queue* queue);

MEMLM_API memlm_status memlm_cuda_w4_sparse_matmul(const memlm_packed* w, const memlm_matmul_args* args,
                                                   memlm_cuda_queue* queue);
/* 16 and 32 bits from compute capability 8.0 on. */
MEMLM_API memlm_status memlm_cuda_block_sparse_matmul(const memlm_packed* w, int bits, const memlm_matmul_args* args,
                                                      memlm_cuda_queue* queue);

/* Gradients, as in memlm.h. */
MEMLM_API memlm_status memlm_cuda_block_sparse_grad_x(const memlm_packed* w, int bits, int64_t m, const float* grad,
                                                      float* grad_x, memlm_cuda_queue* queue);
MEMLM_API memlm_status memlm_cuda_block_sparse_grad_values(const memlm_packed* w, int64_t m, const float* grad,
                                                           const float* x, float* grad_values,
                                                           memlm_cuda_queue* queue);

/* head_dim and v_dim up to 256; q_len and k_len below 2^30.  Probabilities are rounded to dtype before they are
 * multiplied with v.  Offsets lie in device memory and are not checked. */
MEMLM_API memlm_status memlm_cuda_attention(const memlm_attention_args* args, memlm_cuda_queue* queue);
/* So are gradients of scores.  head_dim and v_dim up to 128 where a block has less than 97 KB of shared memory. */
MEMLM_API memlm_status memlm_cuda_attention_backward(const memlm_attention_args* args,
                                                     const memlm_attention_grads* grads, memlm_cuda_queue* queue);

#ifdef __cplusplus
}
#endif
#endif
