// The ops over dense packed matrices, on any device: `On` says which, Cpu (cpu.h) or Gpu (gpu.h).
#pragma once
#include <tuple>

#include "../formats.h"
#include "tensors.h"
#include "unpacked.h"

namespace memlm_torch {

// What codes stand for, as memlm/formats.py, CODEBOOKS, numbers it.
enum Codebook { kNumbers = 0, kNf4 = 1, kTernary = 2 };

inline void check_format(int64_t bits, int64_t n, int64_t k, int64_t group) {
  STD_TORCH_CHECK(n >= 1 && n <= INT32_MAX && k >= 1 && k <= INT32_MAX,
                  "n, k: accepted is 1 to 2^31-1");
  STD_TORCH_CHECK(group == 32 || group == 64 || group == 128 || (group == 0 && bits == 8),
                  "group: accepted are 32, 64, 128, and 0 for 8 bits");
  STD_TORCH_CHECK(bits == 2 || bits == 4 || bits == 8, "bits: accepted are 2, 4, 8");
}

// The shapes of a packed matrix.
struct Layout {
  std::vector<int64_t> codes, scales;
  Layout(int64_t bits, int64_t n, int64_t k, int64_t group) {
    const int64_t tiles = memlm::div_up(n, memlm::kTileRows), padded = memlm::padded_k(k, group);
    const int64_t blocks = memlm::tile_bytes(static_cast<int>(bits), padded) / memlm::kBlock;
    codes = {tiles, blocks, memlm::kTileRows, memlm::kLaneK};
    scales = {tiles, group ? padded / group : 1, memlm::kTileRows};
  }
};

// W, which lies where `at` does.
inline memlm_packed packed(const Tensor& at, const Tensor& codes, const Tensor& scales,
                           const OptionalTensor& offsets, int64_t bits, int64_t n, int64_t k, int64_t group,
                           int64_t codebook = kNumbers) {
  check_format(bits, n, k, group);
  STD_TORCH_CHECK(codebook == kNumbers || codebook == kNf4, "codebook: accepted are 0, 1");
  STD_TORCH_CHECK(codes.scalar_type() == (bits == 8 ? ScalarType::Char : ScalarType::Byte),
                  "codes: expected ", bits == 8 ? "int8 for 8 bits" : "uint8 for 2 and 4 bits");
  const Layout layout(bits, n, k, group);
  check_part(codes, at, "codes", layout.codes);
  check_part(scales, at, "scales", layout.scales);
  if (offsets) {
    check_part(*offsets, at, "offsets", layout.scales);
    STD_TORCH_CHECK(offsets->scalar_type() == scales.scalar_type(),
                    "offsets: expected the dtype of scales");
  }
  return {codes.const_data_ptr(),
          scales.const_data_ptr(),
          offsets ? offsets->const_data_ptr() : nullptr,
          dtype_of(scales.scalar_type(), "scales"),
          n,
          k,
          group,
          codebook == kNf4 ? memlm_nf4_levels : nullptr,
          MEMLM_DENSE,
          nullptr,
          nullptr};
}

// Of rows of W, which has `bits`, as unpacked_matmul asks for them.
template <class On>
auto unpack(const Tensor& x, const memlm_packed& w, int bits) {
  return [&x, &w, bits](int64_t first, int64_t rows, memlm_dtype dtype, void* out) {
    On::call(x, On::dequantize, &w, bits, first, rows, dtype, out);
  };
}

template <class On>
Tensor w2_matmul(Tensor x, Tensor codes, Tensor scales, OptionalTensor offsets, int64_t n,
                 int64_t k, int64_t group, OptionalTensor bias, bool fast, OptionalTensor norm,
                 double eps, bool swiglu, OptionalTensor residual) {
  Around around = {bias, norm, eps, swiglu, residual};
  const memlm_packed w = packed(x, codes, scales, offsets, 2, n, k, group);
  if (is_unpacked<On>(x, w)) return unpacked_matmul(x, w, around, unpack<On>(x, w, 2));
  const auto kernel = [&](auto... arguments) { On::call(x, On::w2_matmul, arguments...); };
  return matmul(x, w, around, fast, x.scalar_type(), kernel);
}

template <class On>
Tensor w4_matmul(Tensor x, Tensor codes, Tensor scales, OptionalTensor offsets, int64_t codebook,
                 int64_t n, int64_t k, int64_t group, OptionalTensor bias, bool fast,
                 OptionalTensor norm, double eps, bool swiglu, OptionalTensor residual) {
  Around around = {bias, norm, eps, swiglu, residual};
  const memlm_packed w = packed(x, codes, scales, offsets, 4, n, k, group, codebook);
  if (is_unpacked<On>(x, w)) return unpacked_matmul(x, w, around, unpack<On>(x, w, 4));
  const auto kernel = [&](auto... arguments) { On::call(x, On::w4_matmul, arguments...); };
  return matmul(x, w, around, fast, x.scalar_type(), kernel);
}

template <class On>
Tensor w8_matmul(Tensor x, Tensor codes, Tensor scales, int64_t n, int64_t k, int64_t group,
                 OptionalTensor bias, bool fast, OptionalTensor norm, double eps, bool swiglu,
                 OptionalTensor residual) {
  Around around = {bias, norm, eps, swiglu, residual};
  const memlm_packed w = packed(x, codes, scales, {}, 8, n, k, group);
  if (is_unpacked<On>(x, w)) return unpacked_matmul(x, w, around, unpack<On>(x, w, 8));
  const auto kernel = [&](auto... arguments) { On::call(x, On::w8_matmul, arguments...); };
  return matmul(x, w, around, fast, x.scalar_type(), kernel);
}

inline int64_t scales_per_row(int64_t k, int64_t x_group) {
  return x_group ? memlm::div_up(k, memlm::kActGroup) : 1;
}

template <class On>
Tensor w8a8_matmul(Tensor x, OptionalTensor x_scales, Tensor codes, Tensor scales, int64_t n,
                   int64_t k, int64_t group, OptionalTensor bias, int64_t x_group,
                   OptionalTensor norm, double eps, bool swiglu, OptionalTensor residual,
                   std::optional<ScalarType> dtype) {
  Around around = {bias, norm, eps, swiglu, residual};
  const memlm_packed w = packed(x, codes, scales, {}, 8, n, k, group);
  ScalarType y_type = x.scalar_type();
  if (x_scales) {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Char, "x: expected int8 beside x_scales");
    check_device(*x_scales, x, "x_scales");
    STD_TORCH_CHECK(x_scales->scalar_type() == ScalarType::Float, "x_scales: expected float32");
    const auto sizes = x_scales->sizes();
    const std::vector<int64_t> shape = with_last(x, true, scales_per_row(k, x_group));
    STD_TORCH_CHECK(std::equal(shape.begin(), shape.end(), sizes.begin(), sizes.end()),
                    "x_scales: the shape does not fit x and x_group");
    make_contiguous(*x_scales);
    y_type = dtype.value_or(ScalarType::Float);
  } else {
    STD_TORCH_CHECK(!dtype || *dtype == y_type, "dtype: the result has that of x");
  }
  const auto kernel = [&](const memlm_packed* weights, const memlm_matmul_args* args) {
    On::call(x, On::w8a8_matmul, weights, args, static_cast<const float*>(data_of(x_scales)), x_group);
  };
  return matmul(x, w, around, true, y_type, kernel);
}

template <class On>
std::tuple<Tensor, Tensor> matmul_topk(Tensor x, Tensor codes, Tensor scales, OptionalTensor offsets,
                                       int64_t bits, int64_t codebook, int64_t n, int64_t k,
                                       int64_t group, OptionalTensor bias, int64_t mode,
                                       OptionalTensor norm, double eps, int64_t top) {
  memlm_linear linear = {};
  linear.w = packed(x, codes, scales, offsets, bits, n, k, group, codebook);
  linear.bits = static_cast<int>(bits);
  STD_TORCH_CHECK(mode >= 0 && mode <= 2, "mode: accepted are 0, 1, 2");
  linear.mode = static_cast<memlm_mode>(mode);
  linear.bias = data_of(bias);
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == k, "x: the last dimension must be ", k);
  if (bias) check_part(*bias, x, "bias", {n});
  if (norm) check_part(*norm, x, "norm", {k});
  for (const OptionalTensor* t : {&bias, &norm})
    STD_TORCH_CHECK(!*t || (*t)->scalar_type() == x.scalar_type(),
                    "bias, norm: expected the dtype of x");
  STD_TORCH_CHECK(top >= 1 && top <= n, "top: accepted is 1 to ", n);
  make_contiguous(x);
  const std::vector<int64_t> shape = with_last(x, true, top);
  Tensor values = torch::stable::new_empty(x, shape, ScalarType::Float);
  Tensor indices = torch::stable::new_empty(x, shape, ScalarType::Long);
  memlm_matmul_args args = {};
  args.m = x.numel() / k;
  args.x = x.const_data_ptr();
  args.x_stride = k;
  args.dtype = dtype_of(x.scalar_type(), "x");
  args.threads = threads();
  args.norm = data_of(norm);
  args.norm_eps = static_cast<float>(eps);
  On::call(x, On::matmul_topk, &linear, &args, top, static_cast<float*>(values.mutable_data_ptr()),
           static_cast<int64_t*>(indices.mutable_data_ptr()));
  return {values, indices};
}

template <class On>
std::tuple<Tensor, Tensor> quantize_rows(Tensor x, int64_t x_group, OptionalTensor norm, double eps) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) >= 1, "x: must have columns");
  const ScalarType type = x.scalar_type();
  const memlm_dtype dtype = dtype_of(type, "x");
  const int64_t k = x.size(x.dim() - 1);
  if (norm) {
    check_part(*norm, x, "norm", {k});
    STD_TORCH_CHECK(norm->scalar_type() == type, "norm: expected the dtype of x");
  }
  make_contiguous(x);
  Tensor codes = torch::stable::new_empty(x, with_last(x, true, k), ScalarType::Char);
  const std::vector<int64_t> shape = with_last(x, true, scales_per_row(k, x_group));
  Tensor scales = torch::stable::new_empty(x, shape, ScalarType::Float);
  On::call(x, On::quantize_rows, x.numel() / k, k, x.const_data_ptr(), k, dtype, data_of(norm),
           static_cast<float>(eps), x_group, static_cast<int8_t*>(codes.mutable_data_ptr()),
           static_cast<float*>(scales.mutable_data_ptr()));
  return {codes, scales};
}

template <class On>
Tensor embedding(Tensor ids, Tensor codes, Tensor scales, OptionalTensor offsets, int64_t bits,
                 int64_t codebook, int64_t n, int64_t k, int64_t group, ScalarType dtype) {
  const memlm_packed w = packed(ids, codes, scales, offsets, bits, n, k, group, codebook);
  STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Long, "ids: expected int64");
  make_contiguous(ids);
  Tensor out = torch::stable::new_empty(codes, with_last(ids, false, k), dtype);
  On::call(ids, On::embedding, &w, static_cast<int>(bits), static_cast<const int64_t*>(ids.const_data_ptr()),
           ids.numel(), dtype_of(dtype, "dtype"), out.mutable_data_ptr());
  return out;
}

template <class On>
Tensor dequantize(Tensor codes, Tensor scales, OptionalTensor offsets, int64_t bits,
                  int64_t codebook, int64_t n, int64_t k, int64_t group, int64_t row, int64_t rows,
                  ScalarType dtype) {
  const memlm_packed w = packed(codes, codes, scales, offsets, bits, n, k, group, codebook);
  STD_TORCH_CHECK(row >= 0 && rows >= 0 && rows <= n - row, "rows: beyond the ", n, " rows of W");
  const std::vector<int64_t> shape = {rows, k};
  Tensor out = torch::stable::new_empty(codes, shape, dtype);
  On::call(codes, On::dequantize, &w, static_cast<int>(bits), row, rows, dtype_of(dtype, "dtype"),
           out.mutable_data_ptr());
  return out;
}

template <class On>
std::tuple<Tensor, Tensor, Tensor> quantize_weight(Tensor w, int64_t bits, int64_t codebook,
                                                   int64_t group, bool has_offsets,
                                                   ScalarType scale_dtype) {
  STD_TORCH_CHECK(w.dim() == 2, "w: must be a matrix");
  const int64_t n = w.size(0), k = w.size(1);
  check_format(bits, n, k, group);
  STD_TORCH_CHECK(codebook == kNumbers || (codebook == kNf4 && bits == 4) ||
                      (codebook == kTernary && bits == 2),
                  "codebook: accepted are 0, for 4 bits 1, for 2 bits 2");
  if (w.stride(1) != 1 || w.stride(0) < k) w = torch::stable::contiguous(w);
  const Layout layout(bits, n, k, group);
  const std::vector<int64_t> none = {0};
  const ScalarType code_type = bits == 8 ? ScalarType::Char : ScalarType::Byte;
  Tensor codes = torch::stable::new_empty(w, layout.codes, code_type);
  Tensor scales = torch::stable::new_empty(w, layout.scales, scale_dtype);
  Tensor offsets =
      torch::stable::new_empty(w, has_offsets ? layout.scales : none, scale_dtype);
  memlm_quantize_args args = {};
  args.n = n;
  args.k = k;
  args.w = w.const_data_ptr();
  args.w_stride = std::max(w.stride(0), k);
  args.dtype = dtype_of(w.scalar_type(), "w");
  args.bits = static_cast<int>(bits);
  args.ternary = codebook == kTernary;
  args.group = group;
  args.levels = codebook == kNf4 ? memlm_nf4_levels : nullptr;
  args.scale_dtype = dtype_of(scale_dtype, "scale_dtype");
  args.codes = codes.mutable_data_ptr();
  args.scales = scales.mutable_data_ptr();
  args.offsets = has_offsets ? offsets.mutable_data_ptr() : nullptr;
  args.threads = threads();
  On::call(w, On::quantize_weight, &args);
  return {codes, scales, offsets};
}

}  // namespace memlm_torch
