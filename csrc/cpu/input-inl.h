// Rows of x as the matmuls read them: f32, zero-padded, and, where the caller asks for it, with the
// step before the layer done on the way: RMSNorm (arXiv:1910.07467) or SwiGLU (arXiv:2002.05202).
#pragma once
#include <math.h>
#include <string.h>

#include "../include/memlm.h"

namespace memlm {
namespace MEMLM_ISA {

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

// e^x, clamped to 2^-126 .. 2^127, to 2 units in the last place (the polynomial of Cephes' expf,
// S. Moshier).
inline F f_exp(F x) {
  x = f_max(f_min(x, f_set1(87.9f)), f_set1(-87.3f));
  const I n = f_round(f_mul(x, f_set1(1.44269504f)));
  const F nf = f_from_i(n);  // ln 2 in two parts: the product with the first is exact
  const F r = f_fma(nf, f_set1(2.12194440e-4f), f_fma(nf, f_set1(-0.693359375f), x));
  constexpr float kPolynomial[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                   4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  F p = f_zero();
  for (float c : kPolynomial) p = f_fma(p, r, f_set1(c));
  return f_mul(f_add(f_fma(p, f_mul(r, r), r), f_set1(1.0f)), f_exp2(n));
}

inline F silu(F x) { return f_div(x, f_add(f_set1(1.0f), f_exp(f_mul(x, f_set1(-1.0f))))); }

// Row `row` of the product's left side: k floats, then zeros up to padded.  In place when x already
// is that.
inline const float* input_row(const memlm_matmul_args& args, int64_t row, int64_t k, int64_t padded,
                              float* buffer) {
  const int64_t size = args.dtype == MEMLM_F32 ? 4 : 2;
  const char* x = static_cast<const char*>(args.x) + row * args.x_stride * size;
  if (args.dtype == MEMLM_F32 && k == padded && !args.norm && !args.swiglu)
    return reinterpret_cast<const float*>(x);
  const auto left = [k](int64_t i) { return k - i < 16 ? k - i : 16; };
  F factor = f_set1(1.0f);
  if (args.norm) {
    F squares = f_zero();
    for (int64_t i = 0; i < k; i += 16) {
      const F v = load_floats(x, args.dtype, i, left(i));
      squares = f_fma(v, v, squares);
    }
    factor = f_set1(1.0f / sqrtf(f_reduce_add(squares) / static_cast<float>(k) + args.norm_eps));
  }
  for (int64_t i = 0; i < k; i += 16) {
    F v = load_floats(x, args.dtype, i, left(i));
    if (args.norm) v = f_mul(f_mul(v, factor), load_floats(args.norm, args.dtype, i, left(i)));
    if (args.swiglu) v = f_mul(silu(v), load_floats(x, args.dtype, k + i, left(i)));
    f_store(buffer + i, v);  // padded is a multiple of 16
  }
  const int64_t written = (k + 15) / 16 * 16;
  memset(buffer + written, 0, sizeof(float) * (padded - written));
  return buffer;
}

}  // namespace MEMLM_ISA
}  // namespace memlm
