/* memlm's C ABI on NVIDIA GPUs: the functions of memlm.h with another prefix, on device memory.
 *
 * All arrays lie in the memory of the current device; structs, and memlm_packed.levels, in the host's.
 * A function begins its work on a stream and returns at once.  It allocates nothing and waits for
 * nothing, so that it may be captured in a graph.  What differs from memlm.h:
 *
 *   activations are f16, or from compute capability 8.0 on bf16, where nothing else is said
 *   codes lie 16-byte aligned
 *   of sparse matrices starts and places are not checked: they must be as memlm/sparse_formats.py says
 *   `fast` and `threads` are not looked at, and as an argument `threads` is left out; products are exact
 *   or rounded once to f32, sums are f32 or exact integers
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

/* Dense matrices, k up to 2,048.  MEMLM_W8A8 takes f32, f16 and bf16 on all devices. */
MEMLM_API memlm_status memlm_cuda_matmul_topk(const memlm_linear* linear, const memlm_matmul_args* args,
                                              int64_t k, float* values, int64_t* indices,
                                              memlm_cuda_queue* queue);

/* Dense matrices; f32, f16 and bf16 on all devices. */
MEMLM_API memlm_status memlm_cuda_dequantize(const memlm_packed* w, int bits, int64_t row, int64_t rows,
                                             memlm_dtype dtype, void* out, memlm_cuda_queue* queue);

/* The same.  Nobody waits to see whether an id is in 0..n-1: the row of one that is not is NaN. */
MEMLM_API memlm_status memlm_cuda_embedding(const memlm_packed* w, int bits, const int64_t* ids,
                                            int64_t count, memlm_dtype dtype, void* out,
                                            memlm_cuda_queue* queue);

/* All of its arrays but levels lie in device memory.  The bits of memlm_quantize_weight. */
MEMLM_API memlm_status memlm_cuda_quantize_weight(const memlm_quantize_args* args, memlm_cuda_queue* queue);

/* Rows of a W of MEMLM_TWO_OF_FOUR or MEMLM_UNSTRUCTURED, as memlm_dequantize; f32, f16 and bf16 on all
 * devices. */
MEMLM_API memlm_status memlm_cuda_w4_sparse_dequantize(const memlm_packed* w, int64_t row, int64_t rows,
                                                       memlm_dtype dtype, void* out, memlm_cuda_queue* queue);

MEMLM_API memlm_status memlm_cuda_w4_sparse_matmul(const memlm_packed* w, const memlm_matmul_args* args,
                                                   memlm_cuda_queue* queue);
/* 16 and 32 bits from compute capability 8.0 on. */
MEMLM_API memlm_status memlm_cuda_block_sparse_matmul(const memlm_packed* w, int bits,
                                                      const memlm_matmul_args* args, memlm_cuda_queue* queue);

/* Rows of a W of MEMLM_BLOCKS, as memlm_dequantize; f32, f16 and bf16 on all devices. */
MEMLM_API memlm_status memlm_cuda_block_sparse_dequantize(const memlm_packed* w, int bits, int64_t row,
                                                          int64_t rows, memlm_dtype dtype, void* out,
                                                          memlm_cuda_queue* queue);

/* Gradients, as in memlm.h. */
MEMLM_API memlm_status memlm_cuda_block_sparse_grad_x(const memlm_packed* w, int bits, int64_t m,
                                                      const float* grad, float* grad_x,
                                                      memlm_cuda_queue* queue);
MEMLM_API memlm_status memlm_cuda_block_sparse_grad_values(const memlm_packed* w, int64_t m,
                                                           const float* grad, const float* x,
                                                           float* grad_values, memlm_cuda_queue* queue);

/* f32, f16 and bf16 on all devices.  A captured graph repeats the step's number: it must be captured again
 * while 1 - beta^step changes. */
MEMLM_API memlm_status memlm_cuda_adamw_8bit(const memlm_adamw_8bit_args* args, memlm_cuda_queue* queue);

/* The cross entropy of z = hidden weight^T + bias, whose logits are not stored (arXiv:2411.09009):
 * lse = log sum exp z of each row, and losses = lse - (1 - label_smoothing) z[target]
 * - label_smoothing mean z; 0 where the target is ignore_index, and NaN where it is none of 0 .. v - 1. */
typedef struct {
  int64_t m, k, v;
  const void* hidden; /* [m, k] */
  const void* weight; /* [v, k] */
  const void* bias;   /* [v], or NULL */
  int64_t hidden_stride, weight_stride; /* elements from one row to the next, at least k */
  memlm_dtype dtype;  /* of these three */
  const int64_t* targets; /* [m] */
  int64_t ignore_index;
  float label_smoothing; /* 0 to 1 */
  float *losses, *lse;   /* [m] */
} memlm_cuda_linear_cross_entropy_args;

MEMLM_API memlm_status memlm_cuda_linear_cross_entropy(const memlm_cuda_linear_cross_entropy_args* args,
                                                       memlm_cuda_queue* queue);

/* The gradients of words first .. first + words - 1's logits, rounded to dtype: what the gradients of hidden
 * and weight are products of.  args->lse is read, args->losses is not looked at. */
typedef struct {
  const float* grad; /* [m]: of losses */
  int64_t first, words;
  void* grad_logits; /* [m, words] */
} memlm_cuda_linear_cross_entropy_grads;

MEMLM_API memlm_status memlm_cuda_linear_cross_entropy_backward(
    const memlm_cuda_linear_cross_entropy_args* args, const memlm_cuda_linear_cross_entropy_grads* grads,
    memlm_cuda_queue* queue);

/* What the host knows of arrays that lie on the device: kernels are begun for so much.  All of
 * memlm_sequences' arrays, and rope->positions, are read by kernels alone, so that a captured graph may
 * be run again with other numbers in them. */
typedef struct {
  int64_t rows;    /* new tokens of all sequences together, at most: of q, k, v */
  int64_t longest; /* tokens of a sequence, at most; 0: as many as table_stride blocks hold */
} memlm_cuda_bounds;

/* A group that is not finite may be stored as another NaN than the CPU's; else its bytes. */
MEMLM_API memlm_status memlm_cuda_kv_append(const memlm_kv_pool* pool, const memlm_sequences* sequences,
                                            const void* k, const void* v, int64_t stride,
                                            memlm_dtype dtype, const memlm_cuda_bounds* bounds,
                                            memlm_cuda_queue* queue);

/* Turns queries and keys to their positions, as memlm_decoder_args says, and appends. */
typedef struct {
  const void* q;        /* [rows, heads, head_dim], of the dtype of k */
  void* turned;         /* as q: what becomes of it; may be q */
  int64_t q_stride, turned_stride; /* elements from one row to the next */
  int64_t heads;        /* a multiple of the pool's kv_heads; 0: keys alone are turned */
  const float *cos, *sin;   /* [angles, head_dim / 2] */
  int64_t angle_stride;     /* elements from one row of both to the next, at least head_dim / 2 */
  const int64_t* positions; /* [rows]: which row of cos and sin each token takes; NULL: 0, 1, ... */
} memlm_cuda_rope;

MEMLM_API memlm_status memlm_cuda_rope_kv_append(const memlm_kv_pool* pool,
                                                 const memlm_sequences* sequences, const void* k,
                                                 const void* v, int64_t stride, memlm_dtype dtype,
                                                 const memlm_cuda_bounds* bounds,
                                                 const memlm_cuda_rope* rope, memlm_cuda_queue* queue);

/* head_dim at most 256.  On compute capability 7.5 numbers of bf16 and f32 caches beyond f16's range
 * become infinite. */
MEMLM_API memlm_status memlm_cuda_paged_attention(const memlm_kv_pool* pool,
                                                  const memlm_sequences* sequences,
                                                  const memlm_paged_attention_args* args,
                                                  const memlm_cuda_bounds* bounds,
                                                  memlm_cuda_queue* queue);

/* head_dim and v_dim up to 256; q_len and k_len below 2^30.  Probabilities are rounded to dtype before they
 * are multiplied with v.  Offsets lie in device memory and are not checked. */
MEMLM_API memlm_status memlm_cuda_attention(const memlm_attention_args* args, memlm_cuda_queue* queue);
/* So are gradients of scores.  head_dim and v_dim up to 128 where a block has less than 97 KB of shared
 * memory. */
MEMLM_API memlm_status memlm_cuda_attention_backward(const memlm_attention_args* args,
                                                     const memlm_attention_grads* grads,
                                                     memlm_cuda_queue* queue);

#ifdef __cplusplus
}
#endif
#endif
