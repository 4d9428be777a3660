// The ops for training, on any device: `On` says which, as in dense.h.
#pragma once
#include "../formats.h"
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

}  // namespace memlm_torch
