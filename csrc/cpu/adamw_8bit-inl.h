// AdamW with moments in 8 bits.  memlm/ops/adamw_8bit.py specifies the step and memlm/dynamic_codes.py the
// codes, to the last bit: operations come in their order, and none are fused.
#pragma once
#include "../adamw_8bit.h"
#include "input-inl.h"

namespace memlm {
namespace MEMLM_ISA {

// A block's moment: f32 from its codes, changed, and back to codes.
template <bool kSigned>
struct Moment {
  alignas(64) float v[kMomentBlock];
  I largest = i_zero();  // magnitudes as bits

  static constexpr const DynamicCodes& book() { return kSigned ? kSignedCodes : kUnsignedCodes; }

  Moment(const uint8_t* codes, float absmax, int count) {
    for (int i = 0; i < count; ++i) v[i] = book().levels[codes[i]] * absmax;
    for (int i = count; i < kMomentBlock; ++i) v[i] = 0;
  }

  F at(int i) const { return f_load(v + i); }
  void set(int i, F x) {
    f_store(v + i, x);
    largest = i_max(largest, f_magnitude_bits(x));
  }

  void encode(uint8_t* codes, float* absmax, int count) const {
    const int32_t bits = i_reduce_max(largest);
    constexpr int32_t kInfinity = 0x7f800000;
    float most;
    memcpy(&most, &bits, 4);
    const float inverse = 1.0f / most;
    const bool finite = bits < kInfinity, usable = finite && inverse < INFINITY;
    *absmax = !finite ? NAN : usable ? most : 0;
    if (!usable) {
      memset(codes, kSigned ? kSignedZero : 0, count);
      return;
    }
    const Table multiply = t_load(book().multiply), add = t_load(book().add);
    const Table least = t_load(book().least), limit = t_load(book().most);
    alignas(64) int32_t out[kMomentBlock];
    for (int i = 0; i < kMomentBlock; i += 16) {
      const F x = f_mul(f_load(v + i), f_set1(inverse));
      const F size = kSigned ? f_max(x, f_sub(f_zero(), x)) : x;
      I c = i_zero();
      for (int b = 0; b < kBounds; ++b) c = i_add_if_less(c, f_set1(book().bounds[b]), size, 1);
      F j = f_from_i(f_round(f_add(f_mul(size, t_lookup(multiply, c)), t_lookup(add, c))));
      j = f_min(f_max(j, t_lookup(least, c)), t_lookup(limit, c));
      const F zero = f_set1(kSignedZero);
      if (kSigned)
        j = f_if_less(x, f_zero(), f_sub(zero, f_min(j, zero)), f_add(zero, j));
      else
        j = f_sub(j, f_set1(1));
      const I code = f_round(j);
      memcpy(out + i, &code, sizeof code);
    }
    for (int i = 0; i < count; ++i) codes[i] = static_cast<uint8_t>(out[i]);
  }
};

inline void adamw_8bit(const memlm_adamw_8bit_args& a, const AdamWFactors& f, int64_t first,
                       int64_t end) {
  for (int64_t block = first; block < end; ++block) {
    const int64_t start = block * kMomentBlock, left = a.count - start;
    const int count = static_cast<int>(left < kMomentBlock ? left : kMomentBlock);
    Moment<true> avg(a.exp_avg + start, a.exp_avg_absmax[block], count);
    Moment<false> avg_sq(a.exp_avg_sq + start, a.exp_avg_sq_absmax[block], count);
    for (int i = 0; i < count; i += 16) {
      const int some = count - i < 16 ? count - i : 16;  // lanes beyond stay 0
      const F grad = load_floats(a.grad, a.dtype, start + i, some);
      const F m = f_add(f_mul(avg.at(i), f_set1(f.beta1)), f_mul(grad, f_set1(f.rest1)));
      const F square = f_mul(f_mul(grad, f_set1(f.rest2)), grad);
      const F v = f_add(f_mul(avg_sq.at(i), f_set1(f.beta2)), square);
      avg.set(i, m);
      avg_sq.set(i, v);
      const F decayed = f_mul(load_floats(a.param, a.dtype, start + i, some), f_set1(f.decay));
      const F root = f_add(f_mul(f_sqrt(v), f_set1(f.unbias)), f_set1(f.eps));
      alignas(64) float param[16];
      f_store(param, f_sub(decayed, f_mul(f_div(m, root), f_set1(f.size))));
      store_floats(a.param, a.dtype, start + i, some, param);
    }
    avg.encode(a.exp_avg + start, a.exp_avg_absmax + block, count);
    avg_sq.encode(a.exp_avg_sq + start, a.exp_avg_sq_absmax + block, count);
  }
}

}  // namespace MEMLM_ISA
}  // namespace memlm
