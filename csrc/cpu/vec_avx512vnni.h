// The vector vocabulary for AVX-512 (F, BW, VL, DQ) + VNNI: 16 lanes are one 512-bit register.
// vec_scalar.h says what each function computes.
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "expand_x86-inl.h"

namespace memlm {
bool cpu_expands_bytes();  // dispatch.cpp: has vpexpandb (AVX-512 VBMI2)
namespace MEMLM_ISA {

using F = __m512;
using I = __m512i;
using B = __m512i;
using Pairs = __m512i;  // vpdpbusd adds all four products of a lane: no pairs are left to add

// Rows of x per register tile: 12 integer and 12 f32 sums, 2 weights, scale and offset are 28 of 32
// registers; activations come as broadcast memory operands.
constexpr int kTileM = 12;
constexpr int kWideTiles = 2;
constexpr int kDirectTilesFast = 5, kDirectTilesAccurate = 3;

inline F f_zero() { return _mm512_setzero_ps(); }
inline F f_set1(float x) { return _mm512_set1_ps(x); }
inline F f_load(const float* p) { return _mm512_loadu_ps(p); }
inline void f_store(float* p, F x) { _mm512_storeu_ps(p, x); }
inline F f_mul(F x, F y) { return _mm512_mul_ps(x, y); }
inline F f_add(F x, F y) { return _mm512_add_ps(x, y); }
inline F f_sub(F x, F y) { return _mm512_sub_ps(x, y); }
inline F f_div(F x, F y) { return _mm512_div_ps(x, y); }
inline F f_sqrt(F x) { return _mm512_sqrt_ps(x); }
inline F f_min(F x, F y) { return _mm512_min_ps(x, y); }
inline F f_max(F x, F y) { return _mm512_max_ps(x, y); }
inline F f_if_less(F a, F b, F x, F y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
}
inline float f_reduce_add(F x) { return _mm512_reduce_add_ps(x); }
inline float f_reduce_max(F x) { return _mm512_reduce_max_ps(x); }
inline F f_fma(F x, F y, F z) { return _mm512_fmadd_ps(x, y, z); }

inline __m256i load256(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
inline F f_load_f16(const uint16_t* p) { return _mm512_cvtph_ps(load256(p)); }
inline F f_load_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load256(p)), 16));
}
inline void f_transpose(F (&x)[16]) {
  F pairs[16], fours[16];  // of rows, within 128-bit quarters
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      fours[i + 2 * j] = _mm512_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0x44);
      fours[i + 2 * j + 1] = _mm512_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0xee);
    }
  for (int i = 0; i < 4; ++i) {  // quarters 0 and 2, or 1 and 3, of two registers, twice
    const F even_high = _mm512_shuffle_f32x4(fours[i], fours[4 + i], 0x88);
    const F even_low = _mm512_shuffle_f32x4(fours[8 + i], fours[12 + i], 0x88);
    const F odd_high = _mm512_shuffle_f32x4(fours[i], fours[4 + i], 0xdd);
    const F odd_low = _mm512_shuffle_f32x4(fours[8 + i], fours[12 + i], 0xdd);
    x[i] = _mm512_shuffle_f32x4(even_high, even_low, 0x88);
    x[4 + i] = _mm512_shuffle_f32x4(odd_high, odd_low, 0x88);
    x[8 + i] = _mm512_shuffle_f32x4(even_high, even_low, 0xdd);
    x[12 + i] = _mm512_shuffle_f32x4(odd_high, odd_low, 0xdd);
  }
}
inline void f_store_f16(uint16_t* p, F x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

inline F f_from_i(I x) { return _mm512_cvtepi32_ps(x); }
inline I f_round(F x) { return _mm512_cvtps_epi32(x); }
inline F f_exp2(I n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23));
}
inline F f_power_of_two(F x) {
  return _mm512_castsi512_ps(
      _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7f800000)));
}
inline I f_magnitude_bits(F x) {
  return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
}

inline I i_zero() { return _mm512_setzero_si512(); }
inline I i_set1(int32_t x) { return _mm512_set1_epi32(x); }
inline I i_add(I x, I y) { return _mm512_add_epi32(x, y); }
inline I i_and(I x, I y) { return _mm512_and_si512(x, y); }
inline I i_or(I x, I y) { return _mm512_or_si512(x, y); }
template <int kShift>
inline I i_shift_left(I x) {
  return _mm512_slli_epi32(x, kShift);
}
inline I i_max(I x, I y) { return _mm512_max_epi32(x, y); }
inline I i_add_if_less(I x, F a, F b, int32_t y) {
  return _mm512_mask_add_epi32(x, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), x, i_set1(y));
}
inline int32_t i_reduce_max(I x) { return _mm512_reduce_max_epi32(x); }
inline int32_t i_reduce_add(I x) { return _mm512_reduce_add_epi32(x); }
inline void i_store_i8(int8_t* p, I x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x));
}

inline B b_load(const void* p) { return _mm512_loadu_si512(p); }
inline void b_store(void* p, B x) { _mm512_storeu_si512(p, x); }
template <int kShift, int kBits>
inline B b_field(B x) {
  return _mm512_and_si512(_mm512_srli_epi16(x, kShift), _mm512_set1_epi8((1 << kBits) - 1));
}
using Table = __m512;
using ByteTable = __m512i;  // the 16 bytes four times
inline Table t_load(const float* p) { return f_load(p); }
inline ByteTable t_load_bytes(const int8_t* p) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline F t_lookup(const Table& t, I x) {  // vpermps looks at the lowest 4 bits of a lane only
  return _mm512_permutexvar_ps(x, t);
}
template <int kShift>
inline F b_lookup_f(B x, const Table& t) {
  return t_lookup(t, _mm512_srli_epi32(x, kShift));
}
inline B b_lookup(B x, const ByteTable& t) { return _mm512_shuffle_epi8(t, x); }
template <int kShift, int kBits>
inline F b_field_to_f(B x) {  // of 2 bits: the two above them do not matter
  const F four = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const F two = _mm512_setr_ps(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);
  static_assert(kBits == 2 || kBits == 4, "a table of 16");
  return b_lookup_f<kShift>(x, kBits == 4 ? four : two);
}
template <int kByte>
inline F b_byte_to_f(B x) {
  return f_from_i(_mm512_srai_epi32(_mm512_slli_epi32(x, 24 - 8 * kByte), 24));
}

// In assembly, because GCC 12 broadcasts to a register first and copies acc around: twice as many
// instructions.
inline I dpbusd(I acc, B w, const int8_t* x) {
#if defined(__AVX512VNNI__)
  __asm__("vpdpbusd %2%{1to16%}, %1, %0"
          : "+v"(acc)
          : "v"(w), "m"(*reinterpret_cast<const char(*)[4]>(x)));
  return acc;
#else  // tests/test_isas.py: emulated
  int32_t x4;
  memcpy(&x4, x, 4);
  return _mm512_dpbusd_epi32(acc, w, i_set1(x4));
#endif
}

inline Pairs pairs_start(int32_t x) { return i_set1(x); }
inline Pairs pairs_dot_u4(Pairs acc, B w, const int8_t* x) { return dpbusd(acc, w, x); }
inline I pairs_sum(Pairs p, int32_t) { return p; }

// vpdpbusd wants unsigned weights: w + 128, and what that adds is taken off by kSignedBias.
constexpr int kSignedBias = 128;
inline B b_bias(B w) { return _mm512_xor_si512(w, _mm512_set1_epi8(-128)); }
inline I i_dot_s8(I acc, B w, const int8_t* x) {
  return dpbusd(acc, w, x);
}
inline I i_dot_u7(I acc, B w, const int8_t* x) { return dpbusd(acc, w, x); }
inline B b_add_where(B x, const uint8_t* p, uint8_t y) {
  uint64_t bits;
  memcpy(&bits, p, 8);
  return _mm512_mask_add_epi8(x, bits, x, _mm512_set1_epi8(static_cast<char>(y)));
}

inline B b_expand_pairs(const uint8_t* codes, const uint8_t* places, uint8_t absent) {
  int64_t all;
  memcpy(&all, places, 8);
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
  const I pairs = _mm512_xor_si512(_mm512_cvtepu8_epi32(bytes), i_set1(absent * 17));
  const I shift = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
  const I p = _mm512_srlv_epi32(_mm512_set1_epi64(all), shift);
  const I p0 = _mm512_slli_epi32(_mm512_and_si512(p, i_set1(3)), 3);  // 8 p0
  const I p1 = _mm512_slli_epi32(_mm512_and_si512(p, i_set1(12)), 1);
  const I low = _mm512_sllv_epi32(_mm512_and_si512(pairs, i_set1(15)), p0);
  const I high = _mm512_sllv_epi32(_mm512_srli_epi32(pairs, 4), p1);
  return _mm512_xor_si512(_mm512_or_si512(low, high), i_set1(absent * 0x01010101));
}
struct Expander {
  const bool at_once = cpu_expands_bytes();
  B operator()(const uint8_t* codes, uint64_t bits, uint8_t absent) const {
#if defined(__AVX512VNNI__)
    if (at_once) {
      const B words = _mm512_cvtepu8_epi16(load256(codes));
      const B stored = _mm512_and_si512(_mm512_or_si512(words, _mm512_slli_epi16(words, 4)),
                                        _mm512_set1_epi8(15));
      B r = _mm512_set1_epi8(static_cast<char>(absent));
      // In assembly, because this file is not compiled for VBMI2.
      __asm__("vpexpandb %1, %0%{%2%}" : "+v"(r) : "v"(stored), "Yk"(static_cast<__mmask64>(bits)));
      return r;
    }
#endif
    alignas(64) uint8_t out[64];
    expand_nibbles(codes, bits, absent, out);
    return b_load(out);
  }
};

constexpr int kDotK = 4;
inline void b_interleave(B&, B&) {}

}  // namespace MEMLM_ISA
}  // namespace memlm
