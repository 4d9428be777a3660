// y = x W^T + bias over 4-bit weights.
#pragma once
#include "matmul-inl.h"

namespace memlm {
namespace MEMLM_ISA {

// A byte holds k + j in its low nibble and k + j + 4 in its high one.
struct Nibbles {
  static constexpr int kBits = 4, kLoadK = 8;
  static constexpr bool kUnpacks = true, kCompressed = false;
  using LoadIndices = Indices<0, 1, 2, 3, 4, 5, 6, 7>;
  static constexpr int shift(int j) { return j % 4 * 8 + j / 4 * 4; }
  static void load2(const uint8_t* p, int i, B& b0, B& b1) {
    const B both = b_load(p + i * kBlock);
    b0 = b_field<0, 4>(both);
    b1 = b_field<4, 4>(both);
  }
};

// Codes are numbers.
template <bool kHasOffsets>
struct W4 : Nibbles, UnsignedSums<kHasOffsets, 8> {
  template <int J>
  F weight(B b) const {
    return b_field_to_f<shift(J), 4>(b);
  }
};

// Codes are places in a table of 16 levels; integer sums use them rounded to 1/127 of the largest.
struct W4Table : Nibbles, SignedSums {
  static constexpr bool kUnit = true;

  Table levels;
  ByteTable bytes;
  float unit;

  explicit W4Table(const float* given) : levels(t_load(given)) {
    float largest = 0;
    for (int i = 0; i < 16; ++i) largest = fabsf(given[i]) > largest ? fabsf(given[i]) : largest;
    unit = largest / 127;
    int8_t rounded[16];
    for (int i = 0; i < 16; ++i)
      rounded[i] = largest > 0 ? static_cast<int8_t>(rintf(given[i] * (127 / largest))) : 0;
    bytes = t_load_bytes(rounded);
  }
  void load2(const uint8_t* p, int i, B& b0, B& b1) const {
    Nibbles::load2(p, i, b0, b1);
    b0 = b_bias(b_lookup(b0, bytes));
    b1 = b_bias(b_lookup(b1, bytes));
  }
  template <int J>
  F weight(B b) const {
    return b_lookup_f<shift(J)>(b, levels);
  }
};

inline memlm_status w4_matmul(const memlm_packed& w, const memlm_matmul_args& args) {
  if (w.levels) return matmul(W4Table(w.levels), w, args);
  return w.offsets ? matmul(W4<true>(), w, args) : matmul(W4<false>(), w, args);
}

}  // namespace MEMLM_ISA
}  // namespace memlm
