// The vector vocabulary for ARMv8.2 with the 8-bit matrix products (i8mm) beside the dot products.
#pragma once
#include "vec_neon-inl.h"

namespace memlm {
namespace MEMLM_ISA {

// Rows of x per register tile.  Fast: 8 registers of integer sums for each of two pairs, 8 of
// weights and one of activations are 25 of 32.  Accurate: as vec_neon_dotprod.h counts.
constexpr int kTileM = 4;
constexpr int kWideTiles = 1;
// Not measured: no such machine was at hand.
constexpr int kDirectTilesFast = 1, kDirectTilesAccurate = 1;

// smmla multiplies 2 rows of 8 k by 2 rows of 8 k: twice the products of sdot.  Its weights are two
// rows of W, 8 k each: from b0's 4 k and b1's of four rows, two registers.
constexpr int kDotK = 8;
inline void b_interleave(B& b0, B& b1) {
  const auto rows = [x = b0, y = b1](int pair) {
    const int32x4_t low = vreinterpretq_s32_s8(x.v[pair / 2]);
    const int32x4_t high = vreinterpretq_s32_s8(y.v[pair / 2]);
    return vreinterpretq_s8_s32(pair % 2 ? vzip2q_s32(low, high) : vzip1q_s32(low, high));
  };
  b0 = quarters<B>(rows);
  b1 = quarters<B>([&](int i) { return rows(4 + i); });
}

template <class W, int MT, int K>
struct Dots;

// Rows of x in pairs; a last one without a partner is its own.
template <class W, int MT>
struct Dots<W, MT, kDotK> {
  static constexpr int kPairs = (MT + 1) / 2;
  // Of rows 2i and 2i + 1 of x, 2j and 2j + 1 of W: the first's sums with both, then the second's.
  int32x4_t p[kPairs][8];

  static constexpr int second(int i) { return 2 * i + 1 < MT ? 2 * i + 1 : 2 * i; }

  template <class Start>
  explicit Dots(const Start& start) {
    for (int i = 0; i < kPairs; ++i)
      for (int j = 0; j < 8; ++j)
        p[i][j] = vcombine_s32(vdup_n_s32(start(2 * i)), vdup_n_s32(start(second(i))));
  }
  void add(B b0, B b1, const int8_t* x) {
    for (int i = 0; i < kPairs; ++i) {
      const int8x16_t rows =
          vcombine_s8(vld1_s8(x + 2 * i * kDotK), vld1_s8(x + second(i) * kDotK));
      for (int j = 0; j < 4; ++j) {
        p[i][j] = vmmlaq_s32(p[i][j], rows, b0.v[j]);
        p[i][4 + j] = vmmlaq_s32(p[i][4 + j], rows, b1.v[j]);
      }
    }
  }
  I total(int m, int32_t) const {
    return quarters<I>([&](int i) {
      const int64x2_t even = vreinterpretq_s64_s32(p[m / 2][2 * i]);
      const int64x2_t odd = vreinterpretq_s64_s32(p[m / 2][2 * i + 1]);
      return vreinterpretq_s32_s64(m % 2 ? vtrn2q_s64(even, odd) : vtrn1q_s64(even, odd));
    });
  }
};

}  // namespace MEMLM_ISA
}  // namespace memlm
