// The vector vocabulary for AVX2 + FMA + F16C.  vec_scalar.h says what each function computes.
#pragma once
#include "vec_256-inl.h"

namespace memlm {
namespace MEMLM_ISA {

struct Pairs { __m256i a, b; };  // 16 sums of two products each, int16

inline Pairs pairs_start(int32_t) { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Pairs pairs_dot_u4(Pairs acc, B w, const int8_t* x) {
  const __m256i x4 = broadcast4(x);
  return {_mm256_add_epi16(acc.a, _mm256_maddubs_epi16(w.a, x4)),
          _mm256_add_epi16(acc.b, _mm256_maddubs_epi16(w.b, x4))};
}
inline I pairs_sum(Pairs p, int32_t start) {  // which int16 could not hold
  const __m256i ones = _mm256_set1_epi16(1);
  return i_add({_mm256_madd_epi16(p.a, ones), _mm256_madd_epi16(p.b, ones)}, i_set1(start));
}

inline I i_dot_u7(I acc, B w, const int8_t* x) {
  const __m256i x4 = broadcast4(x), ones = _mm256_set1_epi16(1);
  const auto dot = [&](__m256i v) { return _mm256_madd_epi16(_mm256_maddubs_epi16(v, x4), ones); };
  return {_mm256_add_epi32(acc.a, dot(w.a)), _mm256_add_epi32(acc.b, dot(w.b))};
}

constexpr int kSignedBias = 0;
inline B b_bias(B w) { return w; }
inline I i_dot_s8(I acc, B w, const int8_t* x) {
  // |w| unsigned times x with w's sign: |w| <= 128, |x| <= 127, so a pair is at most 32,512.
  const __m256i x4 = broadcast4(x), ones = _mm256_set1_epi16(1);
  const auto dot = [&](__m256i v) {
    const __m256i p = _mm256_maddubs_epi16(_mm256_abs_epi8(v), _mm256_sign_epi8(x4, v));
    return _mm256_madd_epi16(p, ones);
  };
  return {_mm256_add_epi32(acc.a, dot(w.a)), _mm256_add_epi32(acc.b, dot(w.b))};
}

}  // namespace MEMLM_ISA
}  // namespace memlm
