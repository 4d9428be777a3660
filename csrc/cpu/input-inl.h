// Rows of x as the matmuls read them: f32, zero-padded, and, where the caller asks for it, after
// RMSNorm (arXiv:1910.07467); or rounded to int8.
#pragma once
#include <math.h>
#include <string.h>

#include "../formats.h"
#include "../include/memlm.h"

namespace memlm {
namespace MEMLM_ISA {

// The left side of a product.
struct Input {
  const memlm_matmul_args& args;
  const float* x_scales;  // of int8 x; NULL: x holds numbers
  int64_t x_group;        // k per scale where x is, or is rounded to, int8: 32, or 0 for the row
};

// Elements i .. i + count - 1 of an array, count 1 to 16; zeros in the lanes beyond.
inline F load_floats(const void* base, memlm_dtype dtype, int64_t i, int64_t count) {
  if (dtype == MEMLM_F32) {
    const float* p = static_cast<const float*>(base) + i;
    if (count == 16) return f_load(p);
    alignas(64) float some[16] = {};
    memcpy(some, p, sizeof(float) * count);
    return f_load(some);
  }
  const uint16_t* p = static_cast<const uint16_t*>(base) + i;
  alignas(64) uint16_t some[16] = {};
  if (count < 16) p = static_cast<const uint16_t*>(memcpy(some, p, sizeof(uint16_t) * count));
  return dtype == MEMLM_F16 ? f_load_f16(p) : f_load_bf16(p);
}

inline uint16_t bf16_of_float(float x) {  // to nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Elements i .. i + count - 1 of an array become x.
inline void store_floats(void* base, memlm_dtype dtype, int64_t i, int64_t count, const float* x) {
  if (dtype == MEMLM_F32) {
    memcpy(static_cast<float*>(base) + i, x, sizeof(float) * count);
    return;
  }
  uint16_t* out = static_cast<uint16_t*>(base) + i;
  if (dtype == MEMLM_BF16) {
    for (int64_t c = 0; c < count; ++c) out[c] = bf16_of_float(x[c]);
    return;
  }
  for (int64_t c = 0; c < count; c += 16) {
    alignas(64) float some[16] = {};
    alignas(64) uint16_t half[16];
    const int64_t left = count - c < 16 ? count - c : 16;
    memcpy(some, x + c, sizeof(float) * left);
    f_store_f16(half, f_load(some));
    memcpy(out + c, half, sizeof(uint16_t) * left);
  }
}

// What RMSNorm (arXiv:1910.07467) multiplies k numbers with, from element i of an array on.
inline F rms_factor(const void* base, memlm_dtype dtype, int64_t i, int64_t k, float eps) {
  F squares = f_zero();
  for (int64_t c = 0; c < k; c += 16) {
    const F v = load_floats(base, dtype, i + c, k - c < 16 ? k - c : 16);
    squares = f_fma(v, v, squares);
  }
  return f_set1(1.0f / sqrtf(f_reduce_add(squares) / static_cast<float>(k) + eps));
}

// Row `row` of the product's left side: k floats, then zeros up to padded.  In place when x already
// is that.
inline const float* input_row(const memlm_matmul_args& args, int64_t row, int64_t k, int64_t padded,
                              float* buffer) {
  const int64_t size = args.dtype == MEMLM_F32 ? 4 : 2;
  const char* x = static_cast<const char*>(args.x) + row * args.x_stride * size;
  if (args.dtype == MEMLM_F32 && k == padded && !args.norm)
    return reinterpret_cast<const float*>(x);
  const auto left = [k](int64_t i) { return k - i < 16 ? k - i : 16; };
  const F factor = args.norm ? rms_factor(x, args.dtype, 0, k, args.norm_eps) : f_set1(1.0f);
  for (int64_t i = 0; i < k; i += 16) {
    F v = load_floats(x, args.dtype, i, left(i));
    if (args.norm) v = f_mul(f_mul(v, factor), load_floats(args.norm, args.dtype, i, left(i)));
    f_store(buffer + i, v);  // padded is a multiple of 16
  }
  const int64_t written = (k + 15) / 16 * 16;
  memset(buffer + written, 0, sizeof(float) * (padded - written));
  return buffer;
}

inline void rows_to_f32(const memlm_matmul_args& args, int64_t k, int64_t out_stride, float* out) {
  for (int64_t row = 0; row < args.m; ++row, out += out_stride) {
    const float* x = input_row(args, row, k, out_stride, out);
    if (x != out) memcpy(out, x, sizeof(float) * k);
  }
}

// How numbers of which the largest has these magnitude bits are rounded to int8:
// memlm/ops/_matmul.py, quantize_activations, specifies it.
struct Rounding {
  float inverse, scale;
  explicit Rounding(int32_t bits) {
    float amax;
    memcpy(&amax, &bits, 4);
    inverse = 127 / amax;
    scale = amax / 127;
    if (bits >= 0x7f800000) {  // Inf or NaN
      inverse = 0;
      scale = NAN;
    } else if (inverse > 3.402823466e38f) {
      inverse = scale = 0;
    }
  }
  I codes(F x) const { return inverse != 0 ? f_round(f_mul(x, f_set1(inverse))) : i_zero(); }
};

// How many floats ahead of those being rounded a row is asked for.  Without it rounding 512 rows of 4,096
// from memory took 0.45 ms more of 1.2, two threads on Zen 5.
constexpr int64_t kRowAhead = 512;

// Calls use(k, codes [32], scale, sum of the codes) for every 32 k of a row, which is rounded to
// int8 where it is not given so.
template <class Use>
inline void quantize_row(const Input& in, int64_t row, int64_t k, int64_t padded, float* buffer,
                         const Use& use) {
  int8_t q[kActGroup];
  if (in.x_scales) {
    const int8_t* x = static_cast<const int8_t*>(in.args.x) + row * in.args.x_stride;
    const float* scales = in.x_scales + row * (in.x_group ? div_up(k, kActGroup) : 1);
    for (int64_t i = 0; i < padded; i += kActGroup) {
      const int64_t left = k - i < kActGroup ? k - i : kActGroup;
      memset(q, 0, kActGroup);
      if (left > 0) memcpy(q, x + i, left);
      int32_t sum = 0;
      for (int8_t code : q) sum += code;
      use(i, q, left > 0 ? scales[in.x_group ? i / kActGroup : 0] : 0.0f, sum);
    }
    return;
  }
  const float* x = input_row(in.args, row, k, padded, buffer);
  I largest = i_zero();
  if (!in.x_group)
    for (int64_t i = 0; i < padded; i += 16) largest = i_max(largest, f_magnitude_bits(f_load(x + i)));
  const Rounding whole(i_reduce_max(largest));
  for (int64_t i = 0; i < padded; i += kActGroup) {
    for (int64_t line = 0; line < kActGroup; line += 16) __builtin_prefetch(x + i + kRowAhead + line);
    const F a = f_load(x + i), b = f_load(x + i + 16);
    const Rounding rounding =
        in.x_group ? Rounding(i_reduce_max(i_max(f_magnitude_bits(a), f_magnitude_bits(b)))) : whole;
    const I qa = rounding.codes(a), qb = rounding.codes(b);
    i_store_i8(q, qa);
    i_store_i8(q + 16, qb);
    use(i, q, rounding.scale, i_reduce_add(i_add(qa, qb)));
  }
}

}  // namespace MEMLM_ISA
}  // namespace memlm
