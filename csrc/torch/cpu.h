// The CPU's kernels, as dense.h and sparse.h call them.
#pragma once
#include "tensors.h"

namespace memlm_torch {

struct Cpu {
  static constexpr bool kUnpacks = false;  // unpacked.h
  static constexpr auto w2_matmul = memlm_w2_matmul, w4_matmul = memlm_w4_matmul, w8_matmul = memlm_w8_matmul;
  static constexpr auto w8a8_matmul = memlm_w8a8_matmul;
  static constexpr auto matmul_topk = memlm_matmul_topk;
  static constexpr auto quantize_rows = memlm_quantize_rows;
  static constexpr auto embedding = memlm_embedding;
  static constexpr auto dequantize = memlm_dequantize;
  static constexpr auto quantize_weight = memlm_quantize_weight;
  static constexpr auto block_sparse_matmul = memlm_block_sparse_matmul;
  static constexpr auto w4_sparse_matmul = memlm_w4_sparse_matmul;
  static constexpr auto attention = memlm_attention, attention_backward = memlm_attention_backward;
  static constexpr auto kv_append = memlm_kv_append;
  static constexpr auto paged_attention = memlm_paged_attention;
  static constexpr auto block_sparse_grad_x = memlm_block_sparse_grad_x;
  static constexpr auto block_sparse_grad_values = memlm_block_sparse_grad_values;
  static memlm_status w4_sparse_dequantize(const memlm_packed* w, int64_t row, int64_t rows,
                                           memlm_dtype dtype, void* out, int count) {
    return memlm_dequantize(w, 4, row, rows, dtype, out, count);
  }
  static constexpr auto adamw_8bit = memlm_adamw_8bit;

  // Runs a function on the tensors that lie where `at` does; the number of threads, if it takes one, comes
  // last.
  template <class Function, class... Arguments>
  static void call(const Tensor& at, Function function, Arguments... arguments) {
    STD_TORCH_CHECK(at.is_cpu(), "the tensors must be on the CPU");
    if constexpr (std::is_invocable_v<Function, Arguments..., int>) {
      check_status(function(arguments..., threads()));
    } else {
      check_status(function(arguments...));
    }
  }
};

}  // namespace memlm_torch
