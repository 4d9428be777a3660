// The ops of attention, on any device: `On` says which, as in dense.h.
#pragma once
#include <utility>

#include "tensors.h"

namespace memlm_torch {

inline void last_dense(Tensor& t) {
  if (t.stride(t.dim() - 1) != 1 && t.size(t.dim() - 1) > 1) t = torch::stable::contiguous(t);
}

inline void first_strides(const Tensor& t, int64_t (&strides)[3]) {
  for (int i = 0; i < 3; ++i) strides[i] = t.stride(i);
}

// New [B, H, L, D], of which the heads of one token lie together.
inline Tensor by_token(const Tensor& like, const std::vector<int64_t>& shape) {
  const std::vector<int64_t> stored = {shape[0], shape[2], shape[1], shape[3]};
  return torch::stable::transpose(torch::stable::new_empty(like, stored), 1, 2);
}

// What keeps the memory of memlm_attention_args alive.
struct AttentionInputs {
  Tensor q, k, v;
  OptionalTensor mask, block_mask;
  int64_t mask_block;
  OptionalTensor q_offsets, k_offsets, slopes, sinks;
  double scale;
  int64_t left, right;
  bool to_end;
  double softcap, dropout;
  OptionalTensor seed;

  // out and lse are left to be set.
  memlm_attention_args args() {
    for (const auto& [t, name] : {std::pair<Tensor*, const char*>{&q, "q"}, {&k, "k"}, {&v, "v"}}) {
      check_device(*t, q, name);
      STD_TORCH_CHECK(t->dim() == 4, name, ": must have 4 dimensions");
      STD_TORCH_CHECK(t->scalar_type() == q.scalar_type(), name, ": expected the dtype of q");
      last_dense(*t);
    }
    const int64_t batch = q.size(0);
    STD_TORCH_CHECK(k.size(0) == batch && v.size(0) == batch && k.size(1) == v.size(1) &&
                        k.size(2) == v.size(2) && k.size(3) == q.size(3),
                    "k, v: the shapes do not fit q's");
    memlm_attention_args a = {};
    a.batch = batch;
    a.heads = q.size(1);
    a.kv_heads = k.size(1);
    a.q_len = q.size(2);
    a.k_len = k.size(2);
    a.head_dim = q.size(3);
    a.v_dim = v.size(3);
    a.q = q.const_data_ptr();
    a.k = k.const_data_ptr();
    a.v = v.const_data_ptr();
    first_strides(q, a.q_strides);
    first_strides(k, a.k_strides);
    first_strides(v, a.v_strides);
    a.dtype = dtype_of(q.scalar_type(), "q");
    STD_TORCH_CHECK(q_offsets.has_value() == k_offsets.has_value(),
                    "q_offsets, k_offsets: both or none");
    if (q_offsets) {
      STD_TORCH_CHECK(batch == 1, "q: sequences with offsets stand in one batch entry");
      a.batch = q_offsets->numel() - 1;
      STD_TORCH_CHECK(a.batch >= 0, "q_offsets: is empty");
      for (const OptionalTensor* t : {&q_offsets, &k_offsets}) {
        check_part(**t, q, "q_offsets, k_offsets", {a.batch + 1});
        STD_TORCH_CHECK((*t)->scalar_type() == ScalarType::Long, "q_offsets, k_offsets: expected int64");
      }
      a.q_offsets = static_cast<const int64_t*>(q_offsets->const_data_ptr());
      a.k_offsets = static_cast<const int64_t*>(k_offsets->const_data_ptr());
    }
    a.scale = static_cast<float>(scale);
    a.left = left;
    a.right = right;
    a.to_end = to_end;
    if (mask) {
      const int64_t whole[] = {batch, a.heads, a.q_len, a.k_len};
      check_device(*mask, q, "mask");
      STD_TORCH_CHECK(mask->dim() == 4, "mask: must have 4 dimensions");
      a.mask_is_bool = mask->scalar_type() == ScalarType::Bool;
      STD_TORCH_CHECK(a.mask_is_bool || mask->scalar_type() == q.scalar_type(),
                      "mask: expected bool or the dtype of q");
      for (int i = 0; i < 4; ++i) {
        STD_TORCH_CHECK(mask->size(i) == whole[i] || mask->size(i) == 1, "mask: dimension ", i, " is ",
                        mask->size(i), ", expected 1 or ", whole[i]);
        a.mask_strides[i] = mask->size(i) == 1 ? 0 : mask->stride(i);
      }
      a.mask = mask->const_data_ptr();
    }
    if (block_mask) {
      STD_TORCH_CHECK(mask_block >= 1 && mask_block <= INT32_MAX, "mask_block: got ", mask_block,
                      ", accepted are multiples of 32");
      const auto blocks = [&](int64_t tokens) { return (tokens + mask_block - 1) / mask_block; };
      const int64_t whole[] = {batch, a.heads, blocks(a.q_len), blocks(a.k_len)};
      check_device(*block_mask, q, "block_mask");
      STD_TORCH_CHECK(block_mask->dim() == 4, "block_mask: must have 4 dimensions");
      STD_TORCH_CHECK(block_mask->scalar_type() == ScalarType::Bool, "block_mask: expected bool");
      for (int i = 0; i < 4; ++i) {
        const int64_t size = block_mask->size(i);
        STD_TORCH_CHECK(size == whole[i] || (size == 1 && i < 2), "block_mask: dimension ", i, " is ",
                        size, ", expected ", i < 2 ? "1 or " : "", whole[i]);
        a.block_mask_strides[i] = size == 1 ? 0 : block_mask->stride(i);
      }
      a.block_mask = static_cast<const uint8_t*>(block_mask->const_data_ptr());
      a.mask_block = mask_block;
    }
    for (const auto& [t, name] :
         {std::pair<OptionalTensor*, const char*>{&slopes, "slopes"}, {&sinks, "sinks"}}) {
      if (!*t) continue;
      check_part(**t, q, name, {a.heads});
      STD_TORCH_CHECK((*t)->scalar_type() == ScalarType::Float, name, ": expected float32");
    }
    a.slopes = static_cast<const float*>(data_of(slopes));
    a.sinks = static_cast<const float*>(data_of(sinks));
    a.softcap = static_cast<float>(softcap);
    a.dropout = static_cast<float>(dropout);
    STD_TORCH_CHECK(seed || dropout == 0, "seed: dropout needs one");
    if (seed) {  // on the CPU wherever q is: nobody waits for a device
      STD_TORCH_CHECK(seed->is_cpu() && seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
                      "seed: expected one int64 on the CPU");
      a.seed = *static_cast<const uint64_t*>(seed->const_data_ptr());
    }
    a.threads = threads();
    return a;
  }
};

template <class On>
std::tuple<Tensor, Tensor> attention(Tensor q, Tensor k, Tensor v, OptionalTensor mask,
                                     OptionalTensor block_mask, int64_t mask_block,
                                     OptionalTensor q_offsets, OptionalTensor k_offsets, double scale,
                                     int64_t left, int64_t right, bool to_end, double softcap,
                                     OptionalTensor slopes, OptionalTensor sinks, double dropout,
                                     OptionalTensor seed) {
  AttentionInputs in = {q, k, v, mask, block_mask, mask_block, q_offsets, k_offsets, slopes, sinks,
                        scale, left, right, to_end, softcap, dropout, seed};
  memlm_attention_args args = in.args();
  Tensor out = by_token(in.q, {in.q.size(0), args.heads, args.q_len, args.v_dim});
  Tensor lse = torch::stable::new_empty(in.q, {in.q.size(0), args.heads, args.q_len}, ScalarType::Float);
  args.out = out.mutable_data_ptr();
  args.lse = static_cast<float*>(lse.mutable_data_ptr());
  first_strides(out, args.out_strides);
  On::call(in.q, On::attention, &args);
  return {out, lse};
}

template <class On>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, OptionalTensor mask,
    OptionalTensor block_mask, int64_t mask_block, OptionalTensor q_offsets, OptionalTensor k_offsets,
    double scale, int64_t left, int64_t right, bool to_end, double softcap, OptionalTensor slopes,
    OptionalTensor sinks, double dropout, OptionalTensor seed, bool want_mask) {
  AttentionInputs in = {q, k, v, mask, block_mask, mask_block, q_offsets, k_offsets, slopes, sinks,
                        scale, left, right, to_end, softcap, dropout, seed};
  memlm_attention_args args = in.args();
  const std::vector<int64_t> out_shape = {q.size(0), args.heads, args.q_len, args.v_dim};
  const std::vector<int64_t> lse_shape = {q.size(0), args.heads, args.q_len}, none = {0};
  for (const auto& [t, name] : {std::pair<Tensor*, const char*>{&grad_out, "grad_out"}, {&out, "out"}}) {
    const auto sizes = t->sizes();
    check_device(*t, q, name);
    STD_TORCH_CHECK(t->scalar_type() == q.scalar_type() &&
                        std::equal(out_shape.begin(), out_shape.end(), sizes.begin(), sizes.end()),
                    name, ": expected q's dtype and the result's shape");
    last_dense(*t);
  }
  check_part(lse, q, "lse", lse_shape);
  STD_TORCH_CHECK(lse.scalar_type() == ScalarType::Float, "lse: expected float32");
  args.out = const_cast<void*>(out.const_data_ptr());
  args.lse = static_cast<float*>(const_cast<void*>(lse.const_data_ptr()));
  first_strides(out, args.out_strides);
  Tensor dq = by_token(q, {q.size(0), q.size(1), q.size(2), q.size(3)});
  Tensor dk = by_token(k, {k.size(0), k.size(1), k.size(2), k.size(3)});
  Tensor dv = by_token(v, {v.size(0), v.size(1), v.size(2), v.size(3)});
  const std::vector<int64_t> matrix = {q.size(0), args.heads, args.q_len, args.k_len};
  Tensor dmask = torch::stable::new_empty(q, want_mask ? matrix : none, ScalarType::Float);
  const std::vector<int64_t> heads = {sinks ? args.heads : 0};
  Tensor dsinks = torch::stable::new_empty(q, heads, ScalarType::Float);
  memlm_attention_grads grads = {};
  grads.grad_out = grad_out.const_data_ptr();
  grads.grad_q = dq.mutable_data_ptr();
  grads.grad_k = dk.mutable_data_ptr();
  grads.grad_v = dv.mutable_data_ptr();
  first_strides(grad_out, grads.grad_out_strides);
  first_strides(dq, grads.grad_q_strides);
  first_strides(dk, grads.grad_k_strides);
  first_strides(dv, grads.grad_v_strides);
  if (want_mask) grads.grad_mask = static_cast<float*>(dmask.mutable_data_ptr());
  if (sinks) grads.grad_sinks = static_cast<float*>(dsinks.mutable_data_ptr());
  On::call(in.q, On::attention_backward, &args, &grads);
  return {dq, dk, dv, dmask, dsinks};
}

}  // namespace memlm_torch
