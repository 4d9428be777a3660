// AMX (tiles, int8, bf16) beside AVX-512 VNNI: products of many rows of x run on the tile unit, the
// rest as in vec_avx512vnni.h.
#pragma once
#include "vec_avx512vnni.h"

#define MEMLM_TILE_UNIT

namespace memlm {
namespace MEMLM_ISA {

// Rows of x from which on it is faster than vector instructions, measured: in fast mode, which unpacks
// W first, at 16 rows 0.97 against 0.79 ms, at 32 rows 1.14 against 1.50 ms (4096x4096).
constexpr int64_t kTilesFromFast = 25, kTilesFromAccurate = kTileM + 1, kTilesFromPerRow = kTileM + 1;

}  // namespace MEMLM_ISA
}  // namespace memlm

#if defined(__AVX512BF16__)
#include "tile_unit.h"
#else  // tests/test_isas.py: emulated
#include <tile_unit.h>
#endif

namespace memlm {
namespace MEMLM_ISA {

// x, or NaN where x is not finite.
inline F f_finite_or_nan(F x) { return _mm512_add_ps(x, _mm512_sub_ps(x, x)); }
// The upper half of every lane: x cut to bf16.
inline F f_cut_to_bf16(F x) {
  return _mm512_castsi512_ps(
      _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(-65536)));
}
// Of 32 lanes of 16 bits: the upper half of each 32-bit lane of x, then of y.
inline B odd_halves() {
  const auto two = [](int i) { return (2 * i + 1) | (2 * i + 3) << 16; };
  return _mm512_setr_epi32(two(0), two(2), two(4), two(6), two(8), two(10), two(12), two(14), two(16),
                           two(18), two(20), two(22), two(24), two(26), two(28), two(30));
}
// 0, 16, 1, 17, ...
inline B pairing() {
  const auto two = [](int i) { return i | (i + 16) << 16; };
  return _mm512_setr_epi32(two(0), two(1), two(2), two(3), two(4), two(5), two(6), two(7), two(8),
                           two(9), two(10), two(11), two(12), two(13), two(14), two(15));
}
// 32 numbers in order, to the nearest bf16.
inline B bf16_round(F x, F y) { return reinterpret_cast<B>(_mm512_cvtne2ps_pbh(y, x)); }
// The same for numbers that are bf16 already.
inline B bf16_exact(F x, F y) {
  return _mm512_permutex2var_epi16(_mm512_castps_si512(x), odd_halves(), _mm512_castps_si512(y));
}
// Takes what the two above give and puts element i of y behind element i of x.
inline B bf16_pairs(B xy) { return _mm512_permutexvar_epi16(pairing(), xy); }

}  // namespace MEMLM_ISA
}  // namespace memlm
