// The table of kernels that one instruction set fills, and the choice among tables.
#pragma once
#include "../adamw_8bit.h"
#include "../include/memlm.h"

namespace memlm {

// Sets memlm_last_error; returns status.
memlm_status fail(memlm_status status, const char* format, ...)
    __attribute__((format(printf, 2, 3)));
// The same for what a kernel returned.
memlm_status said(memlm_status status);
bool is_dtype(int dtype);
// Of any pattern; and a dense one.
memlm_status check_weight(const memlm_packed* w, int bits);
memlm_status check_dense(const memlm_packed* w, int bits);
// What a pattern needs beyond that (sparse.cpp).
memlm_status check_pattern(const memlm_packed& w, int bits);
memlm_status check_matmul(const memlm_packed& w, const memlm_matmul_args* args);
// Also that the blocks are in the pool which tokens within `window` of the new ones (0: all) are in.
memlm_status check_paged(const memlm_kv_pool* pool, const memlm_sequences* sequences, int64_t window);

// Heads of queries and keys, on their way from a matmul to attention: each is normalised, where it has
// a norm, and turned to its position, in place.
struct Heads {
  void* x;  // [rows, heads + kv_heads + any number, head_dim]: queries, keys
  int64_t stride;  // elements from one row to the next
  memlm_dtype dtype;  // of x, q_norm, k_norm
  int64_t heads, kv_heads, head_dim;
  const void *q_norm, *k_norm;  // [head_dim] or NULL
  float norm_eps;
  const float *cos, *sin;  // as in memlm_decoder_args, as are the next two
  int64_t angle_stride;
  const int64_t* positions;
};

struct Kernels {
  const char* name;
  int64_t tiles_from_fast, tiles_from_accurate;  // memlm_tile_rows
  memlm_status (*w2_matmul)(const memlm_packed&, const memlm_matmul_args&);
  memlm_status (*w4_matmul)(const memlm_packed&, const memlm_matmul_args&);
  memlm_status (*w8_matmul)(const memlm_packed&, const memlm_matmul_args&);
  memlm_status (*w8a8_matmul)(const memlm_packed&, const memlm_matmul_args&, const float* x_scales,
                              int64_t x_group);
  memlm_status (*block_sparse_matmul)(const memlm_packed&, int bits, const memlm_matmul_args&);
  memlm_status (*w4_sparse_matmul)(const memlm_packed&, const memlm_matmul_args&);
  memlm_status (*block_sparse_grad_x)(const memlm_packed&, int bits, int64_t m, const float* grad,
                                      float* grad_x, int threads);
  void (*block_sparse_grad_values)(const memlm_packed&, int64_t m, const float* grad, const float* x,
                                   float* grad_values, int threads);
  memlm_status (*quantize_rows)(const memlm_matmul_args&, int64_t k, int64_t x_group, int8_t* codes,
                                float* scales);
  // rows of x in f32, after args.norm where there is one, then zeros; rows of out are out_stride apart,
  // a multiple of 16
  void (*rows_to_f32)(const memlm_matmul_args& args, int64_t k, int64_t out_stride, float* out);
  void (*turn_heads)(const Heads&, int64_t first_row, int64_t end_row);
  // rows of W by index; ids == nullptr means row, row + 1, ...
  void (*dequantize_rows)(const memlm_packed&, int bits, const int64_t* ids, int64_t row,
                          int64_t count, memlm_dtype dtype, void* out);
  // rows row, row + 1, ... of a sparse W
  void (*sparse_rows)(const memlm_packed&, int bits, int64_t row, int64_t count, memlm_dtype dtype,
                      void* out);
  // of a row of k numbers: the magnitude as its bits, Inf and NaN being the largest
  int32_t (*largest_bits)(const void* row, memlm_dtype dtype, int64_t k);
  void (*quantize_weight)(const memlm_quantize_args&, int64_t first_tile, int64_t end_tile);
  memlm_status (*attention)(const memlm_attention_args&);
  memlm_status (*attention_backward)(const memlm_attention_args&, const memlm_attention_grads&);
  void (*kv_append)(const memlm_kv_pool&, const memlm_sequences&, const void* k, const void* v,
                    int64_t stride, memlm_dtype dtype, int threads);
  memlm_status (*paged_attention)(const memlm_kv_pool&, const memlm_sequences&,
                                  const memlm_paged_attention_args&);
  // of blocks of 256 numbers
  void (*adamw_8bit)(const memlm_adamw_8bit_args&, const AdamWFactors&, int64_t first_block,
                     int64_t end_block);
};

// Those in use.
const Kernels& kernels();

namespace scalar { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace avxvnni { extern const Kernels kernels; }
namespace avx512vnni { extern const Kernels kernels; }
namespace amx { extern const Kernels kernels; }
namespace neon_dotprod { extern const Kernels kernels; }
namespace neon_i8mm { extern const Kernels kernels; }

}  // namespace memlm
