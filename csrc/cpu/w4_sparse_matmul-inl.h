// y = x W^T + bias over 4-bit weights of which two in four are stored, or any.
#pragma once
#include "w4_matmul-inl.h"

namespace memlm {
namespace MEMLM_ISA {

// Base over codes that Places expands to one byte each.
template <class Base, class Places>
struct Expanded : Base {
  static constexpr bool kCompressed = true;
  static constexpr int kLoadK = kLaneK;
  Places places;
  uint8_t absent;  // the code of 0

  Expanded(const Base& base, uint8_t absent) : Base(base), places(), absent(absent) {}
  template <class C>
  B expand(C& cursor) const {
    return places(cursor, absent);
  }
  // The bytes that integer sums take.
  B dot_block(B codes) const {
    if constexpr (Base::kUnit) return b_bias(b_lookup(codes, this->bytes));
    return codes;
  }
  template <int J>
  F weight(B codes) const {
    if constexpr (Base::kUnit) return b_lookup_f<8 * J>(codes, this->levels);
    return b_byte_to_f<J>(codes);
  }
};

template <class Base, class Use>
inline auto with_places(const Base& base, uint8_t absent, const memlm_packed& w, const Use& use) {
  if (w.pattern == MEMLM_TWO_OF_FOUR) return use(Expanded<Base, TwoOfFour>(base, absent));
  return use(Expanded<Base, Unstructured>(base, absent));
}

// use(codec) with what reads W's codes.
template <class Use>
inline auto with_expanded(const memlm_packed& w, const Use& use) {
  if (!w.levels) return with_places(W4<false>(), W4<false>::kZero, w, use);
  uint8_t absent = 0;
  while (w.levels[absent] != 0) ++absent;  // the caller has checked that there is one
  return with_places(W4Table(w.levels), absent, w, use);
}

inline memlm_status w4_sparse_matmul(const memlm_packed& w, const memlm_matmul_args& args) {
  return with_expanded(w, [&](const auto& codec) { return matmul(codec, w, args); });
}

}  // namespace MEMLM_ISA
}  // namespace memlm
