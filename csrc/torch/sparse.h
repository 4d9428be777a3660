// The ops over sparse matrices (memlm/sparse_formats.py), on any device: `On` says which, as in dense.h.
#pragma once
#include "../formats.h"
#include "unpacked.h"

namespace memlm_torch {

using memlm::div_up;
using memlm::kActGroup;
using memlm::kLaneK;
using memlm::kTileRows;

constexpr int64_t kSpareBytes = 64;  // behind unstructured codes

inline void check_sizes(int64_t n, int64_t k) {
  STD_TORCH_CHECK(n >= 1 && n <= INT32_MAX && k >= 1 && k <= INT32_MAX,
                  "n, k: accepted is 1 to 2^31-1");
}

inline const float* levels_of(int64_t codebook) {
  STD_TORCH_CHECK(codebook == 0 || codebook == 1, "codebook: accepted are 0, 1");
  return codebook ? memlm_nf4_levels : nullptr;
}

// starts [tiles + 1], of which the last is `end`; the C ABI checks the others.  In a GPU's memory they
// are believed: to look at them is to wait for what was begun before.
inline const int64_t* starts_of(const Tensor& at, const Tensor& starts, int64_t n, int64_t end) {
  const int64_t tiles = div_up(n, kTileRows);
  STD_TORCH_CHECK(starts.scalar_type() == ScalarType::Long, "starts: expected int64");
  check_part(starts, at, "starts", {tiles + 1});
  const int64_t* p = static_cast<const int64_t*>(starts.const_data_ptr());
  if (at.is_cpu()) {
    STD_TORCH_CHECK(p[0] == 0 && p[tiles] == end, "starts: expected 0 first and ", end, " last");
  }
  return p;
}

// W, which lies where `at` does.
inline memlm_packed blocks(const Tensor& at, const Tensor& starts, const Tensor& places, const Tensor& codes,
                    const OptionalTensor& scales, const OptionalTensor& offsets, int64_t bits,
                    int64_t codebook, int64_t n, int64_t k) {
  check_sizes(n, k);
  const bool floats = bits == 16 || bits == 32;
  STD_TORCH_CHECK(floats || bits == 2 || bits == 4 || bits == 8, "bits: accepted are 2, 4, 8, 16, 32");
  const ScalarType type = bits == 32   ? ScalarType::Float
                          : bits == 16 ? ScalarType::BFloat16
                          : bits == 8  ? ScalarType::Char
                                       : ScalarType::Byte;
  STD_TORCH_CHECK(codes.scalar_type() == type, "codes: the dtype does not fit bits");
  STD_TORCH_CHECK(places.scalar_type() == ScalarType::Int, "places: expected int32");
  STD_TORCH_CHECK(places.dim() == 1, "places: expected one dimension");
  const int64_t count = places.size(0);
  check_part(places, at, "places", {count});
  if (floats) {
    check_part(codes, at, "codes", {count, kActGroup, kTileRows});
  } else {
    check_part(codes, at, "codes", {count, bits, kTileRows, kLaneK});
  }
  STD_TORCH_CHECK(floats == !scales && !(floats && offsets),
                  "scales: expected with codes of 2, 4, 8 bits, and only then");
  if (scales) check_part(*scales, at, "scales", {count, kTileRows});
  if (offsets) {
    check_part(*offsets, at, "offsets", {count, kTileRows});
    STD_TORCH_CHECK(offsets->scalar_type() == scales->scalar_type(),
                    "offsets: expected the dtype of scales");
  }
  memlm_packed w = {};
  alignas(16) static const char nothing[64] = {};  // codes and scales of no blocks
  w.codes = count ? codes.const_data_ptr() : nothing;
  w.scales = floats ? nullptr : count ? data_of(scales) : nothing;
  w.offsets = offsets ? (count ? data_of(offsets) : nothing) : nullptr;
  w.scale_dtype = scales ? dtype_of(scales->scalar_type(), "scales") : MEMLM_F32;
  w.n = n;
  w.k = k;
  w.group = kActGroup;
  w.levels = levels_of(codebook);
  w.pattern = MEMLM_BLOCKS;
  w.starts = starts_of(at, starts, n, count);
  w.places = places.const_data_ptr();
  return w;
}

template <class On>
Tensor block_sparse_matmul(Tensor x, Tensor starts, Tensor places, Tensor codes, OptionalTensor scales,
                           OptionalTensor offsets, int64_t bits, int64_t codebook, int64_t n, int64_t k,
                           OptionalTensor bias, bool fast, OptionalTensor norm, double eps, bool swiglu,
                           OptionalTensor residual) {
  Around around = {bias, norm, eps, swiglu, residual};
  const memlm_packed w = blocks(x, starts, places, codes, scales, offsets, bits, codebook, n, k);
  if constexpr (On::kUnpacks) {
    // The kernel reads x for each block that is stored: of 4096 x 4096 and 512 rows 1.24 GB times the share
    // that is, from an L2 cache of some 5.5 TB/s, where unpacking and torch's product take 33 us
    // (unpacked.h): reckoned, not measured, as long for one block of seven.  f32 weights are more than x's
    // type holds.
    constexpr int64_t kFew = 8;
    const int64_t all = div_up(n, kTileRows) * div_up(k, kActGroup);
    if (bits != 32 && places.size(0) * kFew >= all && is_unpacked<On>(x, w)) {
      const auto unpack = [&](int64_t first, int64_t rows, memlm_dtype dtype, void* out) {
        On::call(x, On::block_sparse_dequantize, &w, static_cast<int>(bits), first, rows, dtype, out);
      };
      return unpacked_matmul(x, w, around, unpack);
    }
  }
  const auto kernel = [&](const memlm_packed* weights, const memlm_matmul_args* args) {
    On::call(x, On::block_sparse_matmul, weights, static_cast<int>(bits), args);
  };
  return matmul(x, w, around, fast, x.scalar_type(), kernel);
}

enum Pattern { kTwoOfFour = MEMLM_TWO_OF_FOUR, kUnstructured = MEMLM_UNSTRUCTURED };

inline memlm_packed compressed(const Tensor& at, const Tensor& codes, const Tensor& places,
                               const OptionalTensor& starts, const Tensor& scales, int64_t pattern,
                               int64_t codebook, int64_t n, int64_t k, int64_t group) {
  check_sizes(n, k);
  STD_TORCH_CHECK(group == 32 || group == 64 || group == 128, "group: accepted are 32, 64, 128");
  STD_TORCH_CHECK(pattern == kTwoOfFour || pattern == kUnstructured, "pattern: accepted are 1, 2");
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte && places.scalar_type() == ScalarType::Byte,
                  "codes, places: expected uint8");
  const int64_t tiles = div_up(n, kTileRows), padded = memlm::padded_k(k, group);
  check_part(places, at, "places", {tiles, padded / kLaneK, memlm::kPlaceBytes});
  check_part(scales, at, "scales", {tiles, padded / group, kTileRows});
  memlm_packed w = {};
  if (pattern == kTwoOfFour) {
    STD_TORCH_CHECK(!starts, "starts: are for pattern 2");
    check_part(codes, at, "codes", {tiles, padded / kLaneK, kTileRows});
  } else {
    STD_TORCH_CHECK(starts.has_value(), "starts: are needed for pattern 2");
    STD_TORCH_CHECK(codes.dim() == 1 && codes.size(0) >= kSpareBytes,
                    "codes: expected one dimension and ", kSpareBytes, " bytes beyond the last");
    check_part(codes, at, "codes", {codes.size(0)});
    w.starts = starts_of(at, *starts, n, codes.size(0) - kSpareBytes);
  }
  w.codes = codes.const_data_ptr();
  w.scales = scales.const_data_ptr();
  w.scale_dtype = dtype_of(scales.scalar_type(), "scales");
  w.n = n;
  w.k = k;
  w.group = group;
  w.levels = levels_of(codebook);
  w.pattern = static_cast<memlm_pattern>(pattern);
  w.places = places.const_data_ptr();
  return w;
}

template <class On>
Tensor w4_sparse_matmul(Tensor x, Tensor codes, Tensor places, OptionalTensor starts, Tensor scales,
                        int64_t pattern, int64_t codebook, int64_t n, int64_t k, int64_t group,
                        OptionalTensor bias, bool fast, OptionalTensor norm, double eps, bool swiglu,
                        OptionalTensor residual) {
  const memlm_packed w = compressed(x, codes, places, starts, scales, pattern, codebook, n, k, group);
  Around around = {bias, norm, eps, swiglu, residual};
  if (is_unpacked<On>(x, w)) {
    const auto unpack = [&](int64_t first, int64_t rows, memlm_dtype dtype, void* out) {
      On::call(x, On::w4_sparse_dequantize, &w, first, rows, dtype, out);
    };
    return unpacked_matmul(x, w, around, unpack);
  }
  const auto kernel = [&](auto... arguments) { On::call(x, On::w4_sparse_matmul, arguments...); };
  return matmul(x, w, around, fast, x.scalar_type(), kernel);
}

template <class On>
Tensor w4_sparse_dequantize(Tensor codes, Tensor places, OptionalTensor starts, Tensor scales,
                            int64_t pattern, int64_t codebook, int64_t n, int64_t k, int64_t group,
                            int64_t row, int64_t rows, ScalarType dtype) {
  const memlm_packed w = compressed(codes, codes, places, starts, scales, pattern, codebook, n, k, group);
  STD_TORCH_CHECK(row >= 0 && rows >= 0 && row <= n && rows <= n - row, "row, rows: W has ", n, " rows");
  const memlm_dtype type = dtype_of(dtype, "dtype");
  Tensor out = torch::stable::new_empty(codes, {rows, k}, dtype);
  On::call(codes, On::w4_sparse_dequantize, &w, row, rows, type, out.mutable_data_ptr());
  return out;
}

// f32 [m, columns], dense.
inline const float* rows_of(Tensor& t, const Tensor& at, const char* name, int64_t columns) {
  check_device(t, at, name);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.dim() == 2 && t.size(1) == columns, name,
                  ": expected float32 [m, ", columns, "]");
  make_contiguous(t);
  return static_cast<const float*>(t.const_data_ptr());
}

template <class On>
Tensor block_sparse_grad_x(Tensor grad, Tensor starts, Tensor places, Tensor codes,
                           OptionalTensor scales, OptionalTensor offsets, int64_t bits,
                           int64_t codebook, int64_t n, int64_t k) {
  const memlm_packed w = blocks(grad, starts, places, codes, scales, offsets, bits, codebook, n, k);
  const float* g = rows_of(grad, grad, "grad", n);
  Tensor out = torch::stable::new_empty(grad, {grad.size(0), k}, ScalarType::Float);
  On::call(grad, On::block_sparse_grad_x, &w, static_cast<int>(bits), grad.size(0), g,
           static_cast<float*>(out.mutable_data_ptr()));
  return out;
}

template <class On>
Tensor block_sparse_grad_values(Tensor grad, Tensor x, Tensor starts, Tensor places, int64_t n,
                                int64_t k) {
  const float* g = rows_of(grad, grad, "grad", n);
  const float* rows = rows_of(x, grad, "x", k);
  STD_TORCH_CHECK(x.size(0) == grad.size(0), "x: expected as many rows as grad has");
  STD_TORCH_CHECK(places.dim() == 1, "places: expected one dimension");
  Tensor out = torch::stable::new_empty(grad, {places.size(0), kActGroup, kTileRows}, ScalarType::Float);
  // The result stands for the values, of which only the places are looked at.
  const memlm_packed w = blocks(grad, starts, places, out, {}, {}, 32, 0, n, k);
  On::call(grad, On::block_sparse_grad_values, &w, grad.size(0), g, rows,
           static_cast<float*>(out.mutable_data_ptr()));
  return out;
}

}  // namespace memlm_torch
