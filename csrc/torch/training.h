// The ops for training, on any device: `On` says which, as in dense.h.
#pragma once
#include <tuple>

#include "../formats.h"
#include "../include/memlm_cuda.h"
#include "tensors.h"

namespace memlm_torch {

// A tensor that is changed in place: [count] of a type.
inline void* in_place(const Tensor& t, const Tensor& at, const char* name, ScalarType type, int64_t count) {
  check_device(t, at, name);
  STD_TORCH_CHECK(t.is_contiguous() && t.numel() == count && t.scalar_type() == type, name,
                  ": must be contiguous, of ", count, " elements, and of the dtype that the op's text says");
  return t.mutable_data_ptr();
}

template <class On>
void adamw_8bit(Tensor param, Tensor grad, Tensor exp_avg, Tensor exp_avg_absmax, Tensor exp_avg_sq,
                Tensor exp_avg_sq_absmax, double lr, double beta1, double beta2, double eps, double weight_decay,
                int64_t step) {
  constexpr int64_t kBlock = 256;
  const int64_t count = param.numel(), blocks = memlm::div_up(count, kBlock);
  check_device(grad, param, "grad");
  const auto sizes = param.sizes(), grad_sizes = grad.sizes();
  STD_TORCH_CHECK(grad.scalar_type() == param.scalar_type() && sizes.size() == grad_sizes.size() &&
                      std::equal(sizes.begin(), sizes.end(), grad_sizes.begin()),
                  "grad: expected the dtype and shape of param");
  make_contiguous(grad);
  memlm_adamw_8bit_args args = {};
  args.count = count;
  args.dtype = dtype_of(param.scalar_type(), "param");
  args.param = in_place(param, param, "param", param.scalar_type(), count);
  args.grad = grad.const_data_ptr();
  args.exp_avg = static_cast<uint8_t*>(in_place(exp_avg, param, "exp_avg", ScalarType::Byte, count));
  args.exp_avg_absmax =
      static_cast<float*>(in_place(exp_avg_absmax, param, "exp_avg_absmax", ScalarType::Float, blocks));
  args.exp_avg_sq = static_cast<uint8_t*>(in_place(exp_avg_sq, param, "exp_avg_sq", ScalarType::Byte, count));
  args.exp_avg_sq_absmax =
      static_cast<float*>(in_place(exp_avg_sq_absmax, param, "exp_avg_sq_absmax", ScalarType::Float, blocks));
  args.lr = lr;
  args.beta1 = beta1;
  args.beta2 = beta2;
  args.eps = eps;
  args.weight_decay = weight_decay;
  args.step = step;
  args.threads = threads();
  On::call(param, On::adamw_8bit, &args);
}

// Rows whose elements lie together, and how far apart the rows are.
inline int64_t row_stride(Tensor& t) {
  const bool dense = t.size(1) <= 1 || t.stride(1) == 1;
  if (!dense || (t.size(0) > 1 && t.stride(0) < t.size(1))) t = torch::stable::contiguous(t);
  return t.size(0) > 1 ? t.stride(0) : t.size(1);
}

template <class On>
std::tuple<Tensor, Tensor> linear_cross_entropy(Tensor hidden, Tensor weight, OptionalTensor bias, Tensor targets,
                                                int64_t ignore_index, double label_smoothing) {
  STD_TORCH_CHECK(hidden.dim() == 2 && weight.dim() == 2 && hidden.size(1) == weight.size(1),
                  "hidden, weight: expected [m, k] and [v, k]");
  const int64_t m = hidden.size(0), v = weight.size(0);
  check_device(weight, hidden, "weight");
  STD_TORCH_CHECK(weight.scalar_type() == hidden.scalar_type(), "weight: expected the dtype of hidden");
  if (bias) {
    check_part(*bias, hidden, "bias", {v});
    STD_TORCH_CHECK(bias->scalar_type() == hidden.scalar_type(), "bias: expected the dtype of hidden");
  }
  check_device(targets, hidden, "targets");
  STD_TORCH_CHECK(targets.scalar_type() == ScalarType::Long && targets.dim() == 1 && targets.size(0) == m,
                  "targets: expected int64 [", m, "]");
  make_contiguous(targets);
  Tensor losses = torch::stable::new_empty(hidden, {m}, ScalarType::Float);
  Tensor lse = torch::stable::new_empty(hidden, {m}, ScalarType::Float);
  memlm_cuda_linear_cross_entropy_args args = {};
  args.m = m;
  args.k = hidden.size(1);
  args.v = v;
  args.hidden_stride = row_stride(hidden);
  args.weight_stride = row_stride(weight);
  args.hidden = hidden.const_data_ptr();
  args.weight = weight.const_data_ptr();
  args.bias = data_of(bias);
  args.dtype = dtype_of(hidden.scalar_type(), "hidden");
  args.targets = static_cast<const int64_t*>(targets.const_data_ptr());
  args.ignore_index = ignore_index;
  args.label_smoothing = static_cast<float>(label_smoothing);
  args.losses = static_cast<float*>(losses.mutable_data_ptr());
  args.lse = static_cast<float*>(lse.mutable_data_ptr());
  On::call(hidden, On::linear_cross_entropy, &args);
  return {losses, lse};
}

}  // namespace memlm_torch
