// The ops over paged keys and values, on any device: `On` says which, as in dense.h.
#pragma once
#include <utility>

#include "../include/memlm_cuda.h"
#include "tensors.h"

namespace memlm_torch {

// A pool's blocks, and the sequences of a step; they live no longer than the tensors.
struct Paged {
  memlm_kv_pool pool;
  memlm_sequences sequences;
  memlm_cuda_bounds bounds;

  // Runs a function, with the bounds if it takes some.
  template <class On, class Function, class... Arguments>
  void call(const Tensor& at, Function function, Arguments... arguments) const {
    if constexpr (std::is_invocable_v<Function, Arguments..., const memlm_cuda_bounds*, memlm_cuda_queue*>) {
      On::call(at, function, arguments..., &bounds);
    } else {
      On::call(at, function, arguments...);
    }
  }

  Paged(const Tensor& blocks, const Tensor& rows, const Tensor& lengths, const Tensor& tables,
        const OptionalTensor& tails, const OptionalTensor& tail_of, int64_t type, int64_t block_tokens,
        int64_t head_dim, int64_t tokens) {
    STD_TORCH_CHECK(blocks.is_contiguous() && blocks.dim() == 3 && blocks.scalar_type() == ScalarType::Byte,
                    "pool: must be a contiguous uint8 tensor, [kv_heads, blocks, bytes]");
    STD_TORCH_CHECK(type >= MEMLM_KV_F32 && type <= MEMLM_KV_INT4, "type: accepted are 0 to 3");
    const auto kv_type = static_cast<memlm_kv_type>(type);
    const int64_t bytes = memlm_kv_block_bytes(kv_type, block_tokens, head_dim);
    STD_TORCH_CHECK(bytes > 0, "block_tokens, head_dim: accepted are multiples of 32 to 256, 1 to 512");
    STD_TORCH_CHECK(blocks.size(2) == bytes, "pool: a block of a head has ", blocks.size(2),
                    " bytes, expected ", bytes);
    const int64_t count = lengths.numel();
    check_part(lengths, blocks, "lengths", {count});
    check_part(rows, blocks, "rows", {count + 1});
    STD_TORCH_CHECK(lengths.scalar_type() == ScalarType::Long && rows.scalar_type() == ScalarType::Long,
                    "rows, lengths: expected int64");
    check_device(tables, blocks, "tables");
    STD_TORCH_CHECK(tables.is_contiguous() && tables.dim() == 2 && tables.size(0) == count &&
                        tables.scalar_type() == ScalarType::Int,
                    "tables: must be a contiguous int32 tensor, [sequences, blocks]");
    STD_TORCH_CHECK(tails.has_value() == tail_of.has_value(), "tails, tail_of: both or none");
    if (tails) {
      const int64_t of_tail = memlm_kv_tail_bytes(kv_type, block_tokens, head_dim);
      check_part(*tails, blocks, "tails", {blocks.size(0), tails->size(1), of_tail});
      STD_TORCH_CHECK(tails->scalar_type() == ScalarType::Byte, "tails: expected uint8");
      check_part(*tail_of, blocks, "tail_of", {count});
      STD_TORCH_CHECK(tail_of->scalar_type() == ScalarType::Int, "tail_of: expected int32");
    }
    pool = {const_cast<void*>(blocks.const_data_ptr()), blocks.size(1), block_tokens, blocks.size(0),
            head_dim, kv_type, const_cast<void*>(data_of(tails)), tails ? tails->size(1) : 0};
    sequences = {count, static_cast<const int64_t*>(rows.const_data_ptr()),
                 static_cast<const int64_t*>(lengths.const_data_ptr()),
                 static_cast<const int32_t*>(tables.const_data_ptr()), tables.size(1),
                 static_cast<const int32_t*>(data_of(tail_of))};
    if (blocks.is_cpu()) {  // in a GPU's memory they are believed, as in sparse.h
      STD_TORCH_CHECK(sequences.rows[count] == tokens, "rows: ends with ", sequences.rows[count],
                      ", there are ", tokens, " new tokens");
    }
    bounds = {tokens, 0};
  }
};

// [tokens, heads, head_dim], whose rows may lie apart.
inline void check_heads(Tensor& t, const Tensor& pool, const char* name) {
  check_device(t, pool, name);
  STD_TORCH_CHECK(t.dim() == 3, name, ": expected [tokens, heads, head_dim]");
  if (t.stride(2) != 1 || t.stride(1) != t.size(2) || t.stride(0) < t.size(1) * t.size(2))
    t = torch::stable::contiguous(t);
}

template <class On>
void kv_append(Tensor pool, OptionalTensor tails, Tensor k, Tensor v, Tensor rows, Tensor lengths,
               Tensor tables, OptionalTensor tail_of, int64_t type, int64_t block_tokens) {
  check_heads(k, pool, "k");
  check_heads(v, pool, "v");
  STD_TORCH_CHECK(k.size(0) == v.size(0) && k.size(1) == v.size(1) && k.size(2) == v.size(2) &&
                      k.scalar_type() == v.scalar_type(),
                  "k, v: expected the same shape and dtype");
  STD_TORCH_CHECK(pool.dim() == 3 && k.size(1) == pool.size(0), "k: has other heads than the pool");
  if (k.stride(0) != v.stride(0)) {
    k = torch::stable::contiguous(k);
    v = torch::stable::contiguous(v);
  }
  const Paged paged(pool, rows, lengths, tables, tails, tail_of, type, block_tokens, k.size(2),
                    k.size(0));
  const int64_t stride = k.size(0) > 1 ? k.stride(0) : k.size(1) * k.size(2);
  paged.call<On>(k, On::kv_append, &paged.pool, &paged.sequences, k.const_data_ptr(), v.const_data_ptr(),
                 stride, dtype_of(k.scalar_type(), "k"));
}

template <class On>
Tensor paged_attention(Tensor q, Tensor pool, OptionalTensor tails, Tensor rows, Tensor lengths,
                       Tensor tables, OptionalTensor tail_of, int64_t type, int64_t block_tokens,
                       double scale, int64_t window, double softcap, OptionalTensor slopes,
                       OptionalTensor sinks) {
  check_heads(q, pool, "q");
  const int64_t tokens = q.size(0), heads = q.size(1), dim = q.size(2);
  const Paged paged(pool, rows, lengths, tables, tails, tail_of, type, block_tokens, dim, tokens);
  for (const auto& [t, name] :
       {std::pair<OptionalTensor*, const char*>{&slopes, "slopes"}, {&sinks, "sinks"}}) {
    if (!*t) continue;
    check_part(**t, q, name, {heads});
    STD_TORCH_CHECK((*t)->scalar_type() == ScalarType::Float, name, ": expected float32");
  }
  Tensor out = torch::stable::new_empty(q, {tokens, heads, dim});
  memlm_paged_attention_args args = {};
  args.q = q.const_data_ptr();
  args.q_stride = tokens > 1 ? q.stride(0) : heads * dim;
  args.out = out.mutable_data_ptr();
  args.out_stride = heads * dim;
  args.heads = heads;
  args.dtype = dtype_of(q.scalar_type(), "q");
  args.scale = static_cast<float>(scale);
  args.window = window;
  args.softcap = static_cast<float>(softcap);
  args.slopes = static_cast<const float*>(data_of(slopes));
  args.sinks = static_cast<const float*>(data_of(sinks));
  args.threads = threads();
  paged.call<On>(q, On::paged_attention, &paged.pool, &paged.sequences, &args);
  return out;
}

}  // namespace memlm_torch
