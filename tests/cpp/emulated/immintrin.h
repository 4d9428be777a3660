// Stands in for the compiler's <immintrin.h>: Intel's intrinsics from SIMDe, in plain C, so that
// kernels for instructions which this CPU lacks run on it.  That shows their logic to be right, not
// what the instructions themselves do.
#pragma once
#include <stdint.h>
#include <string.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

// The intrinsics of the kernels that SIMDe 0.7 lacks, half by half; later versions may have them.
namespace halves {

template <class To, class From>
inline To cast(From x) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  memcpy(&to, &x, sizeof to);
  return to;
}
template <class Half>
struct Pair { Half v[2]; };
using F = Pair<__m256>;
using I = Pair<__m256i>;
using H = Pair<__m128i>;

template <class To, class Halves, class Function>
inline To map(Halves x, Function f) {
  return cast<To>(Pair<decltype(f(x.v[0]))>{f(x.v[0]), f(x.v[1])});
}

inline __m512 cvtepi32_ps(__m512i x) {
  return map<__m512>(cast<I>(x), [](__m256i h) { return _mm256_cvtepi32_ps(h); });
}
inline __m512i cvtps_epi32(__m512 x) {
  return map<__m512i>(cast<F>(x), [](__m256 h) { return _mm256_cvtps_epi32(h); });
}
inline __m512i cvtepu16_epi32(__m256i x) {
  return map<__m512i>(cast<H>(x), [](__m128i h) { return _mm256_cvtepu16_epi32(h); });
}
inline __m512i cvtepu8_epi32(__m128i x) {
  return cast<__m512i>(I{{_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(_mm_srli_si128(x, 8))}});
}
inline __m512 cvtph_ps(__m256i x) {
  return map<__m512>(cast<H>(x), [](__m128i h) { return _mm256_cvtph_ps(h); });
}
inline __m256i cvtps_ph(__m512 x, int) {  // rounds to nearest, as all of the kernels do
  return map<__m256i>(cast<F>(x), [](__m256 h) { return _mm256_cvtps_ph(h, 0); });
}
inline __m512i srai_epi32(__m512i x, int count) {
  return map<__m512i>(cast<I>(x), [&](__m256i h) { return _mm256_srai_epi32(h, count); });
}

// x behind y, each to the nearest bf16.
inline __m512bh cvtne2ps_pbh(__m512 x, __m512 y) {
  struct { uint32_t i[32]; } wide = cast<decltype(wide)>(Pair<__m512>{y, x});
  struct { uint16_t i[32]; } result;
  for (int i = 0; i < 32; ++i) {
    const uint32_t bits = wide.i[i], magnitude = bits & 0x7fffffff;
    uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
    if (magnitude > 0x7f800000) rounded = bits | 0x400000;   // NaN
    if (magnitude < 0x00800000) rounded = bits & 0x80000000;  // denormal numbers count as zero
    result.i[i] = static_cast<uint16_t>(rounded >> 16);
  }
  return cast<__m512bh>(result);
}

struct Lanes { int32_t i[16]; };
struct FloatLanes { float f[16]; };
inline __m128i cvtepi32_epi8(__m512i x) {
  struct { int8_t i[16]; } low;
  for (int i = 0; i < 16; ++i) low.i[i] = static_cast<int8_t>(cast<Lanes>(x).i[i]);
  return cast<__m128i>(low);
}
inline int reduce_add_epi32(__m512i x) {
  int sum = 0;
  for (int lane : cast<Lanes>(x).i) sum += lane;
  return sum;
}
inline int reduce_max_epi32(__m512i x) {
  int most = INT32_MIN;
  for (int lane : cast<Lanes>(x).i) most = lane > most ? lane : most;
  return most;
}
inline float reduce_add_ps(__m512 x) {
  float sum = 0;
  for (float lane : cast<FloatLanes>(x).f) sum += lane;
  return sum;
}
inline float reduce_max_ps(__m512 x) {
  const FloatLanes lanes = cast<FloatLanes>(x);
  float most = lanes.f[0];
  for (float lane : lanes.f) most = lane > most ? lane : most;
  return most;
}

}  // namespace halves

#undef _mm512_cvtepi32_ps
#undef _mm512_cvtps_epi32
#undef _mm512_cvtepu16_epi32
#undef _mm512_cvtepu8_epi32
#undef _mm512_cvtph_ps
#undef _mm512_cvtps_ph
#undef _mm512_srai_epi32
#undef _mm512_cvtepi32_epi8
#undef _mm512_reduce_add_epi32
#undef _mm512_reduce_max_epi32
#undef _mm512_reduce_add_ps
#undef _mm512_reduce_max_ps
#undef _mm512_cvtne2ps_pbh
#define _mm512_cvtepi32_ps halves::cvtepi32_ps
#define _mm512_cvtps_epi32 halves::cvtps_epi32
#define _mm512_cvtepu16_epi32 halves::cvtepu16_epi32
#define _mm512_cvtepu8_epi32 halves::cvtepu8_epi32
#define _mm512_cvtph_ps halves::cvtph_ps
#define _mm512_cvtps_ph halves::cvtps_ph
#define _mm512_srai_epi32 halves::srai_epi32
#define _mm512_cvtepi32_epi8 halves::cvtepi32_epi8
#define _mm512_reduce_add_epi32 halves::reduce_add_epi32
#define _mm512_reduce_max_epi32 halves::reduce_max_epi32
#define _mm512_reduce_add_ps halves::reduce_add_ps
#define _mm512_reduce_max_ps halves::reduce_max_ps
#define _mm512_cvtne2ps_pbh halves::cvtne2ps_pbh
#define _mm512_shuffle_f32x4(x, y, quarters) \
  _mm512_castsi512_ps(_mm512_shuffle_i32x4(_mm512_castps_si512(x), _mm512_castps_si512(y), quarters))
