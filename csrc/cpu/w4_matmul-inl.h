// y = x W^T + bias over 4-bit weights.
#pragma once
#include "matmul-inl.h"

namespace memlm {
namespace MEMLM_ISA {

template <bool kHasOffsets>
struct W4 {
  static constexpr int kBits = 4, kZero = 8, kDotBias = kHasOffsets ? 0 : kZero, kLoadK = 8;
  static constexpr bool kOffsets = kHasOffsets, kUnpacks = true;
  using LoadIndices = Indices<0, 1, 2, 3, 4, 5, 6, 7>;
  using Sums = Pairs;

  static Sums start(int32_t x) { return pairs_start(x); }
  static Sums dot(Sums acc, B w, const int8_t* x) { return pairs_dot_u4(acc, w, x); }
  static I total(Sums acc, int32_t start) { return pairs_sum(acc, start); }
  // A byte holds k + j in its low nibble and k + j + 4 in its high one.
  static void load2(const uint8_t* p, int i, B& b0, B& b1) {
    const B both = b_load(p + i * kBlock);
    b0 = b_low_nibbles(both);
    b1 = b_high_nibbles(both);
  }
  template <int J>
  static F weight(B b) {
    return b_nibble_to_f<J % 4 * 8 + J / 4 * 4>(b);
  }
};

inline memlm_status w4_matmul(const memlm_packed& w, const memlm_matmul_args& args) {
  return w.offsets ? matmul<W4<true>>(w, args) : matmul<W4<false>>(w, args);
}

}  // namespace MEMLM_ISA
}  // namespace memlm
