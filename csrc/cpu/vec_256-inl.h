// What vec_avx2.h and vec_avxvnni.h have in common: 16 lanes as two 256-bit registers, all of the
// vector vocabulary but the integer products.  vec_scalar.h says what each function computes.
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "expand_x86-inl.h"

namespace memlm {
namespace MEMLM_ISA {

struct F { __m256 a, b; };
struct I { __m256i a, b; };
struct B { __m256i a, b; };

// Rows of x per register tile: 6 x 2 accumulators, 2 weights, 1 broadcast are 15 of 16 registers.
constexpr int kTileM = 6;
constexpr int kWideTiles = 1;
constexpr int kDirectTilesFast = 3, kDirectTilesAccurate = 1;

inline F f_zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F f_set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F f_load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void f_store(float* p, F x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
inline F f_mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F f_add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F f_sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F f_div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F f_sqrt(F x) { return {_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)}; }
inline F f_min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline F f_max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline F f_if_less(F a, F b, F x, F y) {
  return {_mm256_blendv_ps(y.a, x.a, _mm256_cmp_ps(a.a, b.a, _CMP_LT_OQ)),
          _mm256_blendv_ps(y.b, x.b, _mm256_cmp_ps(a.b, b.b, _CMP_LT_OQ))};
}
inline float f_reduce_add(F x) {
  const __m256 v = _mm256_add_ps(x.a, x.b);
  __m128 h = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  h = _mm_add_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
}
inline float f_reduce_max(F x) {
  const __m256 v = _mm256_max_ps(x.a, x.b);
  __m128 h = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  h = _mm_max_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
}
inline F f_fma(F x, F y, F z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}

inline __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline __m256i load256(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}

inline F f_load_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(load128(p)), _mm256_cvtph_ps(load128(p + 8))};
}
inline F f_load_bf16(const uint16_t* p) {
  const auto widen = [](__m128i h) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
  };
  return {widen(load128(p)), widen(load128(p + 8))};
}
// 8 registers: lane i of x[j] and lane j of x[i] change places.
inline void transpose8(__m256 (&x)[8]) {
  __m256 pairs[8], fours[8];  // of rows, within 128-bit halves
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      fours[i + 2 * j] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0x44);
      fours[i + 2 * j + 1] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0xee);
    }
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
    x[i + 4] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
  }
}
inline void f_transpose(F (&x)[16]) {
  __m256 left[8], right[8], low_left[8], low_right[8];
  for (int i = 0; i < 8; ++i) {
    left[i] = x[i].a;
    right[i] = x[i].b;
    low_left[i] = x[8 + i].a;
    low_right[i] = x[8 + i].b;
  }
  transpose8(left);
  transpose8(right);
  transpose8(low_left);
  transpose8(low_right);
  for (int i = 0; i < 8; ++i) {
    x[i] = {left[i], low_left[i]};
    x[8 + i] = {right[i], low_right[i]};
  }
}
inline void f_store_f16(uint16_t* p, F x) {
  __m128i* out = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(out, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(out + 1, _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}

inline F f_from_i(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline I f_round(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
inline F f_exp2(I n) {
  const __m256i bias = _mm256_set1_epi32(127);
  const auto power = [bias](__m256i v) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(v, bias), 23));
  };
  return {power(n.a), power(n.b)};
}
inline F f_power_of_two(F x) {
  const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7f800000));
  return {_mm256_and_ps(x.a, mask), _mm256_and_ps(x.b, mask)};
}
inline I f_magnitude_bits(F x) {
  const __m256i mask = _mm256_set1_epi32(0x7fffffff);
  return {_mm256_and_si256(_mm256_castps_si256(x.a), mask),
          _mm256_and_si256(_mm256_castps_si256(x.b), mask)};
}

inline I i_zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline I i_set1(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline I i_add(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline I i_and(I x, I y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
inline I i_or(I x, I y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
template <int kShift>
inline I i_shift_left(I x) {
  return {_mm256_slli_epi32(x.a, kShift), _mm256_slli_epi32(x.b, kShift)};
}
inline I i_max(I x, I y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
inline I i_add_if_less(I x, F a, F b, int32_t y) {
  const __m256i some = _mm256_set1_epi32(y);
  const auto added = [some](__m256i v, __m256 left, __m256 right) {
    const __m256 mask = _mm256_cmp_ps(left, right, _CMP_LT_OQ);
    return _mm256_add_epi32(v, _mm256_and_si256(_mm256_castps_si256(mask), some));
  };
  return {added(x.a, a.a, b.a), added(x.b, a.b, b.b)};
}
inline int32_t i_reduce_max(I x) {
  __m256i v = _mm256_max_epi32(x.a, x.b);
  __m128i h = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  h = _mm_max_epi32(h, _mm_shuffle_epi32(h, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(h, _mm_shuffle_epi32(h, 0xb1)));
}
inline int32_t i_reduce_add(I x) {
  __m256i v = _mm256_add_epi32(x.a, x.b);
  __m128i h = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  h = _mm_add_epi32(h, _mm_shuffle_epi32(h, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(h, _mm_shuffle_epi32(h, 0xb1)));
}
inline void i_store_i8(int8_t* p, I x) {
  // packs works within 128-bit halves: [x0-3 x8-11 | x4-7 x12-15], put in order by the permute.
  __m256i h = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packs_epi16(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1)));
}

inline B b_load(const void* p) {
  return {load256(p), load256(static_cast<const char*>(p) + 32)};
}
inline void b_store(void* p, B x) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), x.a);
  _mm256_storeu_si256(static_cast<__m256i*>(p) + 1, x.b);
}
template <int kShift, int kBits>
inline B b_field(B x) {
  const __m256i mask = _mm256_set1_epi8((1 << kBits) - 1);
  return {_mm256_and_si256(_mm256_srli_epi16(x.a, kShift), mask),
          _mm256_and_si256(_mm256_srli_epi16(x.b, kShift), mask)};
}
template <int kShift, int kBits>
inline F b_field_to_f(B x) {
  const __m256i mask = _mm256_set1_epi32((1 << kBits) - 1);
  return f_from_i({_mm256_and_si256(_mm256_srli_epi32(x.a, kShift), mask),
                   _mm256_and_si256(_mm256_srli_epi32(x.b, kShift), mask)});
}
struct Table { __m256 low, high; };  // entries 0 to 7, 8 to 15
using ByteTable = __m256i;           // the 16 bytes twice
inline Table t_load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline ByteTable t_load_bytes(const int8_t* p) { return _mm256_broadcastsi128_si256(load128(p)); }
inline F t_lookup(const Table& t, I x) {  // looks at the lowest 4 bits of a lane only
  const auto entry = [&](__m256i index) {  // vpermps looks at 3 bits; the fourth goes to the sign
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.low, index),
                            _mm256_permutevar8x32_ps(t.high, index),
                            _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
  };
  return {entry(x.a), entry(x.b)};
}
template <int kShift>
inline F b_lookup_f(B x, const Table& t) {
  return t_lookup(t, {_mm256_srli_epi32(x.a, kShift), _mm256_srli_epi32(x.b, kShift)});
}
inline B b_lookup(B x, const ByteTable& t) {
  return {_mm256_shuffle_epi8(t, x.a), _mm256_shuffle_epi8(t, x.b)};
}
template <int kByte>
inline F b_byte_to_f(B x) {
  return f_from_i({_mm256_srai_epi32(_mm256_slli_epi32(x.a, 24 - 8 * kByte), 24),
                   _mm256_srai_epi32(_mm256_slli_epi32(x.b, 24 - 8 * kByte), 24)});
}

inline __m256i broadcast4(const int8_t* x) {
  int32_t bits;
  memcpy(&bits, x, 4);
  return _mm256_set1_epi32(bits);
}

inline B b_add_where(B x, const uint8_t* p, uint8_t y) {
  const __m256i bytes = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2,
                                         2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
  const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
  const auto added = [&](__m256i v, const uint8_t* from) {
    int32_t bits;
    memcpy(&bits, from, 4);
    const __m256i spread = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bits), bytes), bit);
    const __m256i is_set = _mm256_cmpeq_epi8(spread, bit);
    return _mm256_add_epi8(v, _mm256_and_si256(is_set, _mm256_set1_epi8(static_cast<char>(y))));
  };
  return {added(x.a, p), added(x.b, p + 4)};
}

// A lane's places as shifts: 8 p0 and 8 p1.
inline B b_expand_pairs(const uint8_t* codes, const uint8_t* places, uint8_t absent) {
  int64_t all;
  memcpy(&all, places, 8);
  const __m256i both = _mm256_set1_epi64x(all), zero = _mm256_set1_epi32(absent * 0x01010101);
  const auto half = [&](int first, __m256i shift) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + first));
    const __m256i pairs = _mm256_xor_si256(_mm256_cvtepu8_epi32(bytes), _mm256_set1_epi32(absent * 17));
    const __m256i p = _mm256_srlv_epi32(both, shift);
    const __m256i p0 = _mm256_slli_epi32(_mm256_and_si256(p, _mm256_set1_epi32(3)), 3);
    const __m256i p1 = _mm256_slli_epi32(_mm256_and_si256(p, _mm256_set1_epi32(12)), 1);
    const __m256i low = _mm256_sllv_epi32(_mm256_and_si256(pairs, _mm256_set1_epi32(15)), p0);
    const __m256i high = _mm256_sllv_epi32(_mm256_srli_epi32(pairs, 4), p1);
    return _mm256_xor_si256(_mm256_or_si256(low, high), zero);
  };
  return {half(0, _mm256_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12)),
          half(8, _mm256_setr_epi32(16, 16, 20, 20, 24, 24, 28, 28))};
}
struct Expander {
  B operator()(const uint8_t* codes, uint64_t bits, uint8_t absent) const {
    alignas(32) uint8_t out[64];
    expand_nibbles(codes, bits, absent, out);
    return b_load(out);
  }
};

constexpr int kDotK = 4;
inline void b_interleave(B&, B&) {}

}  // namespace MEMLM_ISA
}  // namespace memlm
