// The vector vocabulary for AVX2 + FMA + F16C + AVX-VNNI.  vec_scalar.h says what each function
// computes.
#pragma once
#include "vec_256-inl.h"

namespace memlm {
namespace MEMLM_ISA {

using Pairs = I;  // vpdpbusd adds all four products of a lane: no pairs are left to add

// In assembly, because GCC 12 keeps the sums of a tile in memory otherwise: up to 12 % slower.
inline I dpbusd(I acc, B w, const int8_t* x) {
#if defined(__AVXVNNI__)
  __m256i x4;
  __asm__("vpbroadcastd %3, %2\n\t"
          "%{vex%} vpdpbusd %2, %4, %0\n\t"
          "%{vex%} vpdpbusd %2, %5, %1"
          : "+x"(acc.a), "+x"(acc.b), "=&x"(x4)
          : "m"(*reinterpret_cast<const char(*)[4]>(x)), "x"(w.a), "x"(w.b));
  return acc;
#else  // tests/test_isas.py: emulated
  const __m256i x4 = broadcast4(x);
  return {_mm256_dpbusd_epi32(acc.a, w.a, x4), _mm256_dpbusd_epi32(acc.b, w.b, x4)};
#endif
}

inline Pairs pairs_start(int32_t x) { return i_set1(x); }
inline Pairs pairs_dot_u4(Pairs acc, B w, const int8_t* x) { return dpbusd(acc, w, x); }
inline I pairs_sum(Pairs p, int32_t) { return p; }

// vpdpbusd wants unsigned weights: w + 128, and what that adds is taken off by kSignedBias.
constexpr int kSignedBias = 128;
inline B b_bias(B w) {
  const __m256i bias = _mm256_set1_epi8(-128);
  return {_mm256_xor_si256(w.a, bias), _mm256_xor_si256(w.b, bias)};
}
inline I i_dot_s8(I acc, B w, const int8_t* x) { return dpbusd(acc, w, x); }
inline I i_dot_u7(I acc, B w, const int8_t* x) { return dpbusd(acc, w, x); }

}  // namespace MEMLM_ISA
}  // namespace memlm
