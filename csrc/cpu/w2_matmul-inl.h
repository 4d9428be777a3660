// y = x W^T + bias over 2-bit weights, ternary ones among them.
#pragma once
#include "matmul-inl.h"

namespace memlm {
namespace MEMLM_ISA {

// A byte holds k + j, k + j + 4, k + j + 8 and k + j + 12, from its lowest bits up.
template <bool kHasOffsets>
struct W2 : UnsignedSums<kHasOffsets, 1> {
  static constexpr int kBits = 2, kLoadK = 16;
  static constexpr bool kUnpacks = true, kCompressed = false;
  using LoadIndices = Indices<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>;

  static void load2(const uint8_t* p, int i, B& b0, B& b1) {
    const B all = b_load(p + i / 2 * kBlock);
    const B both = i % 2 ? b_field<4, 4>(all) : b_field<0, 4>(all);
    b0 = b_field<0, 2>(both);
    b1 = b_field<2, 2>(both);
  }
  template <int J>
  F weight(B b) const {
    return b_field_to_f<J % 4 * 8 + J / 4 * 2, 2>(b);
  }
};

inline memlm_status w2_matmul(const memlm_packed& w, const memlm_matmul_args& args) {
  return w.offsets ? matmul(W2<true>(), w, args) : matmul(W2<false>(), w, args);
}

}  // namespace MEMLM_ISA
}  // namespace memlm
