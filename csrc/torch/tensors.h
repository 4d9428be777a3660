// What the files of torch ops share: from tensors to what the C ABI takes.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "../include/memlm.h"

namespace memlm_torch {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline memlm_dtype dtype_of(ScalarType type, const char* name) {
  if (type == ScalarType::Float) return MEMLM_F32;
  if (type == ScalarType::Half) return MEMLM_F16;
  STD_TORCH_CHECK(type == ScalarType::BFloat16, name, ": accepted dtypes are float32, float16, bfloat16");
  return MEMLM_BF16;
}

inline void check_status(memlm_status status) { STD_TORCH_CHECK(status == MEMLM_OK, memlm_last_error()); }

// Tensors of one call lie on one device.
inline void check_device(const Tensor& t, const Tensor& at, const char* name) {
  STD_TORCH_CHECK(t.device() == at.device(), name, ": must be on the device of the other tensors");
}

// What the C ABI cannot see: the device, that of `at`, contiguity, and that the memory holds what n, k,
// group claim.
inline void check_part(const Tensor& t, const Tensor& at, const char* name,
                       const std::vector<int64_t>& shape) {
  check_device(t, at, name);
  STD_TORCH_CHECK(t.is_contiguous(), name, ": must be contiguous");
  const auto sizes = t.sizes();
  const bool same = std::equal(shape.begin(), shape.end(), sizes.begin(), sizes.end());
  STD_TORCH_CHECK(same, name, ": the shape does not fit n, k and group");
}

inline std::vector<int64_t> with_last(const Tensor& t, bool replace, int64_t last) {
  const auto sizes = t.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end() - (replace ? 1 : 0));
  shape.push_back(last);
  return shape;
}

inline const void* data_of(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

inline int threads() { return static_cast<int>(torch::stable::get_num_threads()); }

inline void make_contiguous(Tensor& t) {
  if (!t.is_contiguous()) t = torch::stable::contiguous(t);
}

// What the matmuls take beside x and W.
struct Around {
  OptionalTensor bias, norm;
  double eps;
  bool swiglu;
  OptionalTensor residual;
};

inline void check_operands(const Tensor& x, const memlm_packed& w, const Around& around, ScalarType y_type) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == w.k, "x: the last dimension must be ", w.k);
  if (around.bias) check_part(*around.bias, x, "bias", {w.n});
  if (around.norm) check_part(*around.norm, x, "norm", {w.k});
  for (const OptionalTensor* t : {&around.bias, &around.norm, &around.residual})
    STD_TORCH_CHECK(!*t || (*t)->scalar_type() == y_type,
                    "bias, norm, residual: expected the dtype of the result");
}

// Makes it contiguous; `shape` is the result's.
inline void check_residual(Tensor& residual, const Tensor& x, const std::vector<int64_t>& shape) {
  make_contiguous(residual);
  const auto sizes = residual.sizes();
  const bool same = std::equal(shape.begin(), shape.end(), sizes.begin(), sizes.end());
  check_device(residual, x, "residual");
  STD_TORCH_CHECK(same, "residual: must have the shape of the result");
}

// y, of y_type, by kernel(w, args); x has last dimension k, and W lies beside it.
template <class Kernel>
Tensor matmul(Tensor x, const memlm_packed& w, Around& around, bool fast, ScalarType y_type,
              const Kernel& kernel) {
  auto& [bias, norm, eps, swiglu, residual] = around;
  check_operands(x, w, around, y_type);
  const int64_t columns = swiglu ? w.n / 2 : w.n;
  const std::vector<int64_t> shape = with_last(x, true, columns);
  if (residual) check_residual(*residual, x, shape);
  make_contiguous(x);
  Tensor y = torch::stable::new_empty(x, shape, y_type);
  memlm_matmul_args args = {};
  args.m = x.numel() / w.k;
  args.x = x.const_data_ptr();
  args.x_stride = w.k;
  args.bias = data_of(bias);
  args.y = y.mutable_data_ptr();
  args.y_stride = columns;
  args.dtype = dtype_of(y_type, "x");
  args.fast = fast;
  args.threads = threads();
  args.norm = data_of(norm);
  args.norm_eps = static_cast<float>(eps);
  args.swiglu = swiglu;
  args.residual = data_of(residual);
  args.residual_stride = columns;
  kernel(&w, &args);
  return y;
}

}  // namespace memlm_torch
