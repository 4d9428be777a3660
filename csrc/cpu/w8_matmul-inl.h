// y = x W^T + bias over 8-bit weights.
#pragma once
#include "matmul-inl.h"

namespace memlm {
namespace MEMLM_ISA {

struct W8 : SignedSums {
  static constexpr int kBits = 8, kLoadK = 4;
  static constexpr bool kUnit = false, kCompressed = false;
  static constexpr bool kUnpacks = kSignedBias != 0 || kDotK != kLaneK;
  using LoadIndices = Indices<0, 1, 2, 3>;

  static void load2(const uint8_t* p, int i, B& b0, B& b1) {
    b0 = b_bias(b_load(p + 2 * i * kBlock));
    b1 = b_bias(b_load(p + (2 * i + 1) * kBlock));
  }
  template <int J>
  F weight(B b) const {
    return b_byte_to_f<J>(b);
  }
};

inline memlm_status w8_matmul(const memlm_packed& w, const memlm_matmul_args& args) {
  return matmul(W8(), w, args);
}

}  // namespace MEMLM_ISA
}  // namespace memlm
