// What the vector vocabularies for Arm share: 16 lanes as four 128-bit registers, with the dot
// products of ARMv8.2.  vec_scalar.h says what each function computes.  Included by
// vec_neon_<extension>.h with MEMLM_ISA set, so that each instruction set has a copy of its own.
#pragma once
#include <arm_neon.h>
#include <stdint.h>
#include <string.h>

namespace memlm {
namespace MEMLM_ISA {

struct F { float32x4_t v[4]; };
struct I { int32x4_t v[4]; };
struct B { int8x16_t v[4]; };
using Pairs = I;  // sdot adds all four products of a lane: no pairs are left to add

// op(0) .. op(3), one for each register of R.
template <class R, class Op>
inline R quarters(const Op& op) {
  return {{op(0), op(1), op(2), op(3)}};
}

inline F f_set1(float x) { return quarters<F>([&](int) { return vdupq_n_f32(x); }); }
inline F f_zero() { return f_set1(0); }
inline F f_load(const float* p) {
  return quarters<F>([&](int i) { return vld1q_f32(p + 4 * i); });
}
inline void f_store(float* p, F x) {
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, x.v[i]);
}
inline F f_mul(F x, F y) {
  return quarters<F>([&](int i) { return vmulq_f32(x.v[i], y.v[i]); });
}
inline F f_add(F x, F y) {
  return quarters<F>([&](int i) { return vaddq_f32(x.v[i], y.v[i]); });
}
inline F f_sub(F x, F y) {
  return quarters<F>([&](int i) { return vsubq_f32(x.v[i], y.v[i]); });
}
inline F f_div(F x, F y) {
  return quarters<F>([&](int i) { return vdivq_f32(x.v[i], y.v[i]); });
}
inline F f_sqrt(F x) {
  return quarters<F>([&](int i) { return vsqrtq_f32(x.v[i]); });
}
// By comparison, since fmin and fmax give NaN where x is NaN.
inline F f_min(F x, F y) {
  return quarters<F>([&](int i) { return vbslq_f32(vcltq_f32(x.v[i], y.v[i]), x.v[i], y.v[i]); });
}
inline F f_max(F x, F y) {
  return quarters<F>([&](int i) { return vbslq_f32(vcgtq_f32(x.v[i], y.v[i]), x.v[i], y.v[i]); });
}
inline F f_if_less(F a, F b, F x, F y) {
  return quarters<F>([&](int i) { return vbslq_f32(vcltq_f32(a.v[i], b.v[i]), x.v[i], y.v[i]); });
}
inline float f_reduce_add(F x) {
  return vaddvq_f32(vaddq_f32(vaddq_f32(x.v[0], x.v[1]), vaddq_f32(x.v[2], x.v[3])));
}
inline float f_reduce_max(F x) {
  return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.v[0], x.v[1]), vmaxq_f32(x.v[2], x.v[3])));
}
inline F f_fma(F x, F y, F z) {
  return quarters<F>([&](int i) { return vfmaq_f32(z.v[i], x.v[i], y.v[i]); });
}

inline F f_load_f16(const uint16_t* p) {
  return quarters<F>([&](int i) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i)));
  });
}
inline F f_load_bf16(const uint16_t* p) {
  return quarters<F>([&](int i) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16));
  });
}
inline void f_transpose(F (&x)[16]) {
  F y[16];
  for (int i = 0; i < 16; i += 4)
    for (int q = 0; q < 4; ++q) {  // 4 rows, 4 lanes of each
      const auto pairs = [&](int row, bool odd) {
        const float32x4_t a = x[i + row].v[q], b = x[i + row + 1].v[q];
        return vreinterpretq_f64_f32(odd ? vtrn2q_f32(a, b) : vtrn1q_f32(a, b));
      };
      for (int j = 0; j < 2; ++j) {
        const float64x2_t first = pairs(0, j), second = pairs(2, j);
        y[4 * q + j].v[i / 4] = vreinterpretq_f32_f64(vtrn1q_f64(first, second));
        y[4 * q + 2 + j].v[i / 4] = vreinterpretq_f32_f64(vtrn2q_f64(first, second));
      }
    }
  for (int i = 0; i < 16; ++i) x[i] = y[i];
}
inline void f_store_f16(uint16_t* p, F x) {
  for (int i = 0; i < 4; ++i) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(x.v[i])));
}

inline F f_from_i(I x) { return quarters<F>([&](int i) { return vcvtq_f32_s32(x.v[i]); }); }
inline I f_round(F x) { return quarters<I>([&](int i) { return vcvtnq_s32_f32(x.v[i]); }); }
inline F f_exp2(I n) {
  return quarters<F>([&](int i) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n.v[i], vdupq_n_s32(127)), 23));
  });
}
inline F f_power_of_two(F x) {
  return quarters<F>([&](int i) {
    const uint32x4_t bits = vandq_u32(vreinterpretq_u32_f32(x.v[i]), vdupq_n_u32(0x7f800000));
    return vreinterpretq_f32_u32(bits);
  });
}
inline I f_magnitude_bits(F x) {
  return quarters<I>([&](int i) { return vreinterpretq_s32_f32(vabsq_f32(x.v[i])); });
}

inline I i_set1(int32_t x) { return quarters<I>([&](int) { return vdupq_n_s32(x); }); }
inline I i_zero() { return i_set1(0); }
inline I i_add(I x, I y) {
  return quarters<I>([&](int i) { return vaddq_s32(x.v[i], y.v[i]); });
}
inline I i_and(I x, I y) {
  return quarters<I>([&](int i) { return vandq_s32(x.v[i], y.v[i]); });
}
inline I i_or(I x, I y) {
  return quarters<I>([&](int i) { return vorrq_s32(x.v[i], y.v[i]); });
}
template <int kShift>
inline I i_shift_left(I x) {
  return quarters<I>([&](int i) { return vshlq_n_s32(x.v[i], kShift); });
}
inline I i_max(I x, I y) {
  return quarters<I>([&](int i) { return vmaxq_s32(x.v[i], y.v[i]); });
}
inline I i_add_if_less(I x, F a, F b, int32_t y) {
  return quarters<I>([&](int i) {
    const int32x4_t less = vreinterpretq_s32_u32(vcltq_f32(a.v[i], b.v[i]));
    return vaddq_s32(x.v[i], vandq_s32(less, vdupq_n_s32(y)));
  });
}
inline int32_t i_reduce_max(I x) {
  return vmaxvq_s32(vmaxq_s32(vmaxq_s32(x.v[0], x.v[1]), vmaxq_s32(x.v[2], x.v[3])));
}
inline int32_t i_reduce_add(I x) {
  return vaddvq_s32(vaddq_s32(vaddq_s32(x.v[0], x.v[1]), vaddq_s32(x.v[2], x.v[3])));
}
inline void i_store_i8(int8_t* p, I x) {
  for (int i = 0; i < 4; i += 2)
    vst1_s8(p + 4 * i, vmovn_s16(vcombine_s16(vmovn_s32(x.v[i]), vmovn_s32(x.v[i + 1]))));
}

inline B b_load(const void* p) {
  return quarters<B>([&](int i) { return vld1q_s8(static_cast<const int8_t*>(p) + 16 * i); });
}
inline void b_store(void* p, B x) {
  for (int i = 0; i < 4; ++i) vst1q_s8(static_cast<int8_t*>(p) + 16 * i, x.v[i]);
}
template <int kShift, int kBits>
inline B b_field(B x) {
  return quarters<B>([&](int i) {
    uint8x16_t bytes = vreinterpretq_u8_s8(x.v[i]);
    if constexpr (kShift > 0) bytes = vshrq_n_u8(bytes, kShift);
    if constexpr (kShift + kBits < 8) bytes = vandq_u8(bytes, vdupq_n_u8((1 << kBits) - 1));
    return vreinterpretq_s8_u8(bytes);
  });
}
// The conversion divides by 2^kShift: nothing has to be shifted.
template <int kShift, int kBits>
inline F b_field_to_f(B x) {
  return quarters<F>([&](int i) {
    const uint32x4_t field =
        vandq_u32(vreinterpretq_u32_s8(x.v[i]), vdupq_n_u32(((1u << kBits) - 1) << kShift));
    if constexpr (kShift == 0)
      return vcvtq_f32_u32(field);
    else
      return vcvtq_n_f32_u32(field, kShift);
  });
}
using Table = uint8x16x4_t;
using ByteTable = int8x16_t;
inline Table t_load(const float* p) {
  const auto entries = [p](int i) { return vreinterpretq_u8_f32(vld1q_f32(p + 4 * i)); };
  return {{entries(0), entries(1), entries(2), entries(3)}};
}
inline ByteTable t_load_bytes(const int8_t* p) { return vld1q_s8(p); }
// tbl takes bytes: entry e is bytes 4e .. 4e + 3.
inline float32x4_t entries(const Table& t, uint32x4_t index) {
  index = vmlaq_u32(vdupq_n_u32(0x03020100), index, vdupq_n_u32(0x04040404));
  return vreinterpretq_f32_u8(vqtbl4q_u8(t, vreinterpretq_u8_u32(index)));
}
inline F t_lookup(const Table& t, I x) {
  return quarters<F>([&](int i) { return entries(t, vreinterpretq_u32_s32(x.v[i])); });
}
template <int kShift>
inline F b_lookup_f(B x, const Table& t) {
  return quarters<F>([&](int i) {
    uint32x4_t index = vreinterpretq_u32_s8(x.v[i]);
    if constexpr (kShift > 0) index = vshrq_n_u32(index, kShift);
    return entries(t, vandq_u32(index, vdupq_n_u32(15)));
  });
}
inline B b_lookup(B x, const ByteTable& t) {
  return quarters<B>([&](int i) { return vqtbl1q_s8(t, vreinterpretq_u8_s8(x.v[i])); });
}
template <int kByte>
inline F b_byte_to_f(B x) {
  return quarters<F>([&](int i) {
    const int32x4_t top = vshlq_n_s32(vreinterpretq_s32_s8(x.v[i]), 24 - 8 * kByte);
    return vcvtq_f32_s32(vshrq_n_s32(top, 24));
  });
}

constexpr int kSignedBias = 0;  // sdot takes signed weights
inline B b_bias(B w) { return w; }
inline I i_dot_s8(I acc, B w, const int8_t* x) {
  uint32_t bits;  // a plain load: sdot by element broadcasts them
  memcpy(&bits, x, 4);
  const int8x8_t x4 = vcreate_s8(bits);
  return quarters<I>([&](int i) { return vdotq_lane_s32(acc.v[i], w.v[i], x4, 0); });
}

inline I i_dot_u7(I acc, B w, const int8_t* x) { return i_dot_s8(acc, w, x); }
inline B b_expand_pairs(const uint8_t* codes, const uint8_t* places, uint8_t absent) {
  const uint32x4_t both = vreinterpretq_u32_u8(vcombine_u8(vld1_u8(places), vld1_u8(places)));
  const uint32x4_t zero = vdupq_n_u32(absent * 0x01010101u);
  return quarters<B>([&](int i) {  // lanes 4i to 4i + 3 have the bits from 8i on
    const uint32_t four[4] = {codes[4 * i], codes[4 * i + 1], codes[4 * i + 2], codes[4 * i + 3]};
    const uint32x4_t pairs = veorq_u32(vld1q_u32(four), vdupq_n_u32(absent * 17u));
    const int32_t shift[4] = {-8 * i, -8 * i, -8 * i - 4, -8 * i - 4};
    const uint32x4_t p = vshlq_u32(both, vld1q_s32(shift));
    const uint32x4_t p0 = vshlq_n_u32(vandq_u32(p, vdupq_n_u32(3)), 3);  // 8 p0
    const uint32x4_t p1 = vshlq_n_u32(vandq_u32(p, vdupq_n_u32(12)), 1);
    const uint32x4_t low = vshlq_u32(vandq_u32(pairs, vdupq_n_u32(15)), vreinterpretq_s32_u32(p0));
    const uint32x4_t high = vshlq_u32(vshrq_n_u32(pairs, 4), vreinterpretq_s32_u32(p1));
    return vreinterpretq_s8_u32(veorq_u32(vorrq_u32(low, high), zero));
  });
}
struct Expander {  // one by one: not measured, no such machine was at hand
  B operator()(const uint8_t* codes, uint64_t bits, uint8_t absent) const {
    alignas(16) uint8_t out[64];
    int next = 0;
    for (int i = 0; i < 64; ++i) {
      const bool stored = bits >> i & 1;
      out[i] = stored ? codes[next / 2] >> next % 2 * 4 & 15 : absent;
      next += stored;
    }
    return b_load(out);
  }
};
inline B b_add_where(B x, const uint8_t* p, uint8_t y) {
  const uint8x16_t bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201));
  return quarters<B>([&](int i) {
    const uint8x16_t bits = vcombine_u8(vdup_n_u8(p[2 * i]), vdup_n_u8(p[2 * i + 1]));
    const uint8x16_t added = vandq_u8(vtstq_u8(bits, bit), vdupq_n_u8(y));
    return vaddq_s8(x.v[i], vreinterpretq_s8_u8(added));
  });
}

inline Pairs pairs_start(int32_t x) { return i_set1(x); }
inline Pairs pairs_dot_u4(Pairs acc, B w, const int8_t* x) { return i_dot_s8(acc, w, x); }
inline I pairs_sum(Pairs p, int32_t) { return p; }

}  // namespace MEMLM_ISA
}  // namespace memlm
