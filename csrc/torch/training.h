// The ops for training, on any device: `On` says which, as in dense.h.
#pragma once
#include <tuple>
#include <utility>

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
                Tensor exp_avg_sq_absmax, double lr, double beta1, double beta2, double eps,
                double weight_decay, int64_t step) {
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

// What keeps the memory of the arguments alive.
struct CrossEntropyInputs {
  Tensor hidden, weight;
  OptionalTensor bias;
  Tensor targets;
  int64_t ignore_index;
  double label_smoothing;

  // losses and lse are left to be set.
  memlm_cuda_linear_cross_entropy_args args() {
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
    memlm_cuda_linear_cross_entropy_args a = {};
    a.m = m;
    a.k = hidden.size(1);
    a.v = v;
    a.hidden_stride = row_stride(hidden);
    a.weight_stride = row_stride(weight);
    a.hidden = hidden.const_data_ptr();
    a.weight = weight.const_data_ptr();
    a.bias = data_of(bias);
    a.dtype = dtype_of(hidden.scalar_type(), "hidden");
    a.targets = static_cast<const int64_t*>(targets.const_data_ptr());
    a.ignore_index = ignore_index;
    a.label_smoothing = static_cast<float>(label_smoothing);
    return a;
  }
};

template <class On>
std::tuple<Tensor, Tensor> linear_cross_entropy(Tensor hidden, Tensor weight, OptionalTensor bias,
                                                Tensor targets, int64_t ignore_index,
                                                double label_smoothing) {
  CrossEntropyInputs in = {hidden, weight, bias, targets, ignore_index, label_smoothing};
  memlm_cuda_linear_cross_entropy_args args = in.args();
  Tensor losses = torch::stable::new_empty(hidden, {args.m}, ScalarType::Float);
  Tensor lse = torch::stable::new_empty(hidden, {args.m}, ScalarType::Float);
  args.losses = static_cast<float*>(losses.mutable_data_ptr());
  args.lse = static_cast<float*>(lse.mutable_data_ptr());
  On::call(hidden, On::linear_cross_entropy, &args);
  return {losses, lse};
}

// Logits whose gradients are there at once: 128 MB.  A chunk of words has a multiple of kChunkUnit.
constexpr int64_t kChunk = int64_t{1} << 26, kChunkUnit = 128;

// The kernel makes gradients of logits, of a chunk of the vocabulary at a time, and torch's products those of
// hidden and weight of them.  With several chunks hidden's gradient is summed in f32, of products that are
// rounded.
template <class On>
std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_backward(Tensor grad, Tensor hidden, Tensor weight,
                                                                 OptionalTensor bias, Tensor targets,
                                                                 Tensor lse, int64_t ignore_index,
                                                                 double label_smoothing, bool want_hidden,
                                                                 bool want_weight, bool want_bias) {
  namespace stable = torch::stable;
  CrossEntropyInputs in = {hidden, weight, bias, targets, ignore_index, label_smoothing};
  memlm_cuda_linear_cross_entropy_args args = in.args();
  for (const auto& [t, name] : {std::pair<Tensor*, const char*>{&grad, "grad"}, {&lse, "lse"}}) {
    make_contiguous(*t);
    check_part(*t, hidden, name, {args.m});
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float, name, ": expected float32");
  }
  STD_TORCH_CHECK(!want_bias || bias, "want_bias: there is none");
  args.lse = const_cast<float*>(static_cast<const float*>(lse.const_data_ptr()));
  const int64_t share = kChunk / std::max<int64_t>(args.m, 1) / kChunkUnit * kChunkUnit;
  const int64_t chunk = std::max(share, kChunkUnit);
  const std::vector<int64_t> none = {0}, of_hidden = {args.m, args.k}, of_weight = {args.v, args.k},
                             of_bias = {args.v};
  const ScalarType type = hidden.scalar_type();
  const bool one = chunk >= args.v;
  Tensor d_hidden =
      stable::new_zeros(hidden, want_hidden && !one ? of_hidden : none, one ? type : ScalarType::Float);
  Tensor d_weight = stable::new_empty(hidden, want_weight ? of_weight : none);
  Tensor d_bias = stable::new_empty(hidden, want_bias ? of_bias : none);
  for (int64_t first = 0; first < args.v; first += chunk) {
    const int64_t words = std::min(chunk, args.v - first);
    Tensor logits = stable::new_empty(hidden, {args.m, words});
    const memlm_cuda_linear_cross_entropy_grads grads = {static_cast<const float*>(grad.const_data_ptr()),
                                                         first, words, logits.mutable_data_ptr()};
    On::call(hidden, On::linear_cross_entropy_backward, &args, &grads);
    if (want_hidden) {
      const Tensor product = stable::matmul(logits, stable::narrow(in.weight, 0, first, words));
      d_hidden = one ? product : stable::subtract(d_hidden, product, -1.0);  // there is no stable add
    }
    if (want_weight) {
      Tensor to = stable::narrow(d_weight, 0, first, words);
      stable::copy_(to, stable::matmul(stable::transpose(logits, 0, 1), in.hidden));
    }
    if (want_bias) {
      Tensor to = stable::narrow(d_bias, 0, first, words);
      const int64_t rows[] = {0};
      stable::copy_(to, stable::sum(logits, torch::headeronly::IntHeaderOnlyArrayRef(rows, 1), false,
                                    ScalarType::Float));
    }
  }
  if (want_hidden && !one) {
    Tensor rounded = stable::new_empty(hidden, of_hidden);
    stable::copy_(rounded, d_hidden);
    d_hidden = rounded;
  }
  return {d_hidden, d_weight, d_bias};
}

}  // namespace memlm_torch
