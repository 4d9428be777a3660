// The vector vocabulary that the kernels are written in, in plain C++: the specification of
// vec_<isa>.h, and the path for CPUs that have nothing better.
//
// Every type has 16 lanes, one per row of a tile (memlm/formats.py):
//   F      16 floats
//   I      16 int32
//   B      one block, 64 bytes: lane r holds 4 consecutive k of row r
//   Pairs  sums of products u4 x s8, exact for 8 calls of pairs_dot_u4: 32 k.  (In AVX2, two int16
//          per lane: 8 calls x 2 products of at most 15 x 127 are 30,480 <= 32,767.)
#pragma once
#include <stdint.h>
#include <string.h>

namespace memlm {
namespace MEMLM_ISA {

struct F { float v[16]; };
struct I { int32_t v[16]; };
struct B { uint8_t v[64]; };
using Pairs = I;

constexpr int kTileM = 4;  // rows of x per register tile
// Tiles of 16 columns that such a register tile has room for in f32 arithmetic.
constexpr int kWideTiles = 1;
// Register tiles of x up to which it is faster to read packed weights for each than to unpack them
// once for all: measured, in fast and in accurate mode.
constexpr int kDirectTilesFast = 1, kDirectTilesAccurate = 1;

#define MEMLM_LANES for (int i = 0; i < 16; ++i)

inline F f_set1(float x) { F r; MEMLM_LANES r.v[i] = x; return r; }
inline F f_zero() { return f_set1(0); }
inline F f_load(const float* p) { F r; memcpy(r.v, p, sizeof r.v); return r; }
inline void f_store(float* p, F x) { memcpy(p, x.v, sizeof x.v); }
inline F f_mul(F x, F y) { MEMLM_LANES x.v[i] *= y.v[i]; return x; }
inline F f_add(F x, F y) { MEMLM_LANES x.v[i] += y.v[i]; return x; }
inline F f_sub(F x, F y) { MEMLM_LANES x.v[i] -= y.v[i]; return x; }
inline F f_div(F x, F y) { MEMLM_LANES x.v[i] /= y.v[i]; return x; }
inline F f_sqrt(F x) { MEMLM_LANES x.v[i] = __builtin_sqrtf(x.v[i]); return x; }
// y where x is NaN.
inline F f_min(F x, F y) { MEMLM_LANES y.v[i] = x.v[i] < y.v[i] ? x.v[i] : y.v[i]; return y; }
inline F f_max(F x, F y) { MEMLM_LANES y.v[i] = x.v[i] > y.v[i] ? x.v[i] : y.v[i]; return y; }
// x where a < b, else y.
inline F f_if_less(F a, F b, F x, F y) {
  MEMLM_LANES y.v[i] = a.v[i] < b.v[i] ? x.v[i] : y.v[i];
  return y;
}
inline float f_reduce_add(F x) { float r = 0; MEMLM_LANES r += x.v[i]; return r; }
inline float f_reduce_max(F x) {
  float r = x.v[0];
  MEMLM_LANES r = x.v[i] > r ? x.v[i] : r;
  return r;
}
// x * y + z; fused where the instruction set has it.
inline F f_fma(F x, F y, F z) { MEMLM_LANES z.v[i] += x.v[i] * y.v[i]; return z; }

inline float float_of_bits(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
inline uint32_t bits_of_float(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
inline float f16_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return float_of_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // The f16 pattern read as a float is 2^-112 times too small; this holds for subnormals as well.
  return float_of_bits(sign | bits_of_float(float_of_bits(rest << 13) * 0x1p112f));
}
inline uint16_t float_to_f16(float x) {  // to nearest, ties to even
  const uint32_t bits = bits_of_float(x), magnitude = bits & 0x7fffffff;
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // 65,520 and beyond round to infinity
  if (magnitude < 0x38800000)                         // subnormal: the addition rounds to 2^-24
    return sign | static_cast<uint16_t>(bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000);
  return sign | static_cast<uint16_t>((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}
inline F f_load_f16(const uint16_t* p) { F r; MEMLM_LANES r.v[i] = f16_to_float(p[i]); return r; }
inline F f_load_bf16(const uint16_t* p) {
  F r;
  MEMLM_LANES r.v[i] = float_of_bits(static_cast<uint32_t>(p[i]) << 16);
  return r;
}
// Lane i of x[j] and lane j of x[i] change places.
inline void f_transpose(F (&x)[16]) {
  MEMLM_LANES for (int j = 0; j < i; ++j) {
    const float lane = x[i].v[j];
    x[i].v[j] = x[j].v[i];
    x[j].v[i] = lane;
  }
}
inline void f_store_f16(uint16_t* p, F x) { MEMLM_LANES p[i] = float_to_f16(x.v[i]); }

inline F f_from_i(I x) { F r; MEMLM_LANES r.v[i] = static_cast<float>(x.v[i]); return r; }
// To the nearest integer, ties to even, for |x| < 2^22: what is added leaves no fraction bits.
inline I f_round(F x) {
  I r;
  MEMLM_LANES r.v[i] = static_cast<int32_t>((x.v[i] + 0x1.8p23f) - 0x1.8p23f);
  return r;
}
// 2^n for n in -126..127, and 0 for -127.
inline F f_exp2(I n) {
  F r;
  MEMLM_LANES r.v[i] = float_of_bits(static_cast<uint32_t>(n.v[i] + 127) << 23);
  return r;
}
// The largest power of two that is not above |x|; 0 for denormal numbers.
inline F f_power_of_two(F x) {
  MEMLM_LANES x.v[i] = float_of_bits(bits_of_float(x.v[i]) & 0x7f800000);
  return x;
}
// |x| as its bits: ordered like |x|, with Inf at 0x7f800000 and NaN above it.
inline I f_magnitude_bits(F x) {
  I r;
  MEMLM_LANES r.v[i] = static_cast<int32_t>(bits_of_float(x.v[i]) & 0x7fffffff);
  return r;
}

inline I i_set1(int32_t x) { I r; MEMLM_LANES r.v[i] = x; return r; }
inline I i_zero() { return i_set1(0); }
inline I i_add(I x, I y) { MEMLM_LANES x.v[i] += y.v[i]; return x; }
inline I i_and(I x, I y) { MEMLM_LANES x.v[i] &= y.v[i]; return x; }
inline I i_or(I x, I y) { MEMLM_LANES x.v[i] |= y.v[i]; return x; }
template <int kShift>
inline I i_shift_left(I x) {
  MEMLM_LANES x.v[i] = static_cast<int32_t>(static_cast<uint32_t>(x.v[i]) << kShift);
  return x;
}
inline I i_max(I x, I y) { MEMLM_LANES x.v[i] = x.v[i] > y.v[i] ? x.v[i] : y.v[i]; return x; }
inline int32_t i_reduce_max(I x) {
  int32_t r = x.v[0];
  MEMLM_LANES r = x.v[i] > r ? x.v[i] : r;
  return r;
}
inline int32_t i_reduce_add(I x) { int32_t r = 0; MEMLM_LANES r += x.v[i]; return r; }
// x + y where a < b, else x.
inline I i_add_if_less(I x, F a, F b, int32_t y) {
  MEMLM_LANES x.v[i] += a.v[i] < b.v[i] ? y : 0;
  return x;
}
// For lanes within int8.
inline void i_store_i8(int8_t* p, I x) { MEMLM_LANES p[i] = static_cast<int8_t>(x.v[i]); }

inline B b_load(const void* p) { B r; memcpy(r.v, p, 64); return r; }
inline void b_store(void* p, B x) { memcpy(p, x.v, 64); }
// Bits kShift.. of each byte, kBits of them.
template <int kShift, int kBits>
inline B b_field(B x) { for (uint8_t& byte : x.v) byte = byte >> kShift & ((1 << kBits) - 1); return x; }
// Bits kShift.. of each lane, kBits (2 or 4) of them, unsigned.
template <int kShift, int kBits>
inline F b_field_to_f(B x) {
  F r;
  MEMLM_LANES r.v[i] = static_cast<float>(x.v[4 * i + kShift / 8] >> kShift % 8 & ((1 << kBits) - 1));
  return r;
}
// Tables of 16 floats and of 16 bytes.
struct Table { float v[16]; };
struct ByteTable { int8_t v[16]; };
inline Table t_load(const float* p) { Table r; memcpy(r.v, p, sizeof r.v); return r; }
inline ByteTable t_load_bytes(const int8_t* p) { ByteTable r; memcpy(r.v, p, sizeof r.v); return r; }
// The entries that lanes, 0..15, choose.
inline F t_lookup(const Table& t, I x) { F r; MEMLM_LANES r.v[i] = t.v[x.v[i]]; return r; }
// The entries that bits kShift..kShift+3 of each lane choose.
template <int kShift>
inline F b_lookup_f(B x, const Table& t) {
  F r;
  MEMLM_LANES r.v[i] = t.v[x.v[4 * i + kShift / 8] >> kShift % 8 & 15];
  return r;
}
// The entries that bytes, 0..15, choose.
inline B b_lookup(B x, const ByteTable& t) {
  for (uint8_t& byte : x.v) byte = static_cast<uint8_t>(t.v[byte]);
  return x;
}
// Byte kByte of each lane, signed.
template <int kByte>
inline F b_byte_to_f(B x) {
  F r;
  MEMLM_LANES r.v[i] = static_cast<float>(static_cast<int8_t>(x.v[4 * i + kByte]));
  return r;
}

// Sums that start at x: pairs_sum takes the same x, and either of the two adds it.
inline Pairs pairs_start(int32_t x) { return i_set1(x); }
// acc[r] += sum over 4 k of w[r][k] * x[k]; w in 0..15, x in -127..127.
inline Pairs pairs_dot_u4(Pairs acc, B w, const int8_t* x) {
  MEMLM_LANES for (int j = 0; j < 4; ++j) acc.v[i] += w.v[4 * i + j] * x[j];
  return acc;
}
inline I pairs_sum(Pairs p, int32_t) { return p; }
// What i_dot_s8 wants added to signed weights, and how: products of kSignedBias with x are part of
// its result.
constexpr int kSignedBias = 0;
inline B b_bias(B w) { return w; }
// As pairs_dot_u4, for b_bias(w) with w in -128..127.
inline I i_dot_s8(I acc, B w, const int8_t* x) {
  MEMLM_LANES for (int j = 0; j < 4; ++j) acc.v[i] += static_cast<int8_t>(w.v[4 * i + j]) * x[j];
  return acc;
}

// The same for w in 0..127.
inline I i_dot_u7(I acc, B w, const int8_t* x) {
  MEMLM_LANES for (int j = 0; j < 4; ++j) acc.v[i] += w.v[4 * i + j] * x[j];
  return acc;
}
// Adds y to the bytes whose bit of the 64 at p, the lowest first, is set.
inline B b_add_where(B x, const uint8_t* p, uint8_t y) {
  for (int i = 0; i < 64; ++i) x.v[i] = static_cast<uint8_t>(x.v[i] + (p[i / 8] >> i % 8 & 1) * y);
  return x;
}

// Two nibbles for each lane at codes (16 bytes), the low one to byte p0 of the lane, the high one to
// byte p1; absent to the other two.  Lane r has the 4 bits p0 | p1 << 2 of the 64-bit number at places
// from bit r % 2 * 32 + r / 2 * 4 on; p0 is not p1.
inline B b_expand_pairs(const uint8_t* codes, const uint8_t* places, uint8_t absent) {
  B r;
  memset(r.v, absent, sizeof r.v);
  uint64_t all;
  memcpy(&all, places, 8);
  MEMLM_LANES {
    const int p = static_cast<int>(all >> (i % 2 * 32 + i / 2 * 4));
    r.v[4 * i + (p & 3)] = codes[i] & 15;
    r.v[4 * i + (p >> 2 & 3)] = codes[i] >> 4;
  }
  return r;
}
// Nibbles at codes, the low one of a byte first, to the bytes whose bit is set, in order; absent to the
// others.  May read 32 bytes of codes.
struct Expander {
  B operator()(const uint8_t* codes, uint64_t bits, uint8_t absent) const {
    B r;
    int next = 0;
    for (int i = 0; i < 64; ++i) {
      const bool stored = bits >> i & 1;
      r.v[i] = stored ? codes[next / 2] >> next % 2 * 4 & 15 : absent;
      next += stored;
    }
    return r;
  }
};

// The k of one row that a product of many rows takes at once: those of one block, or 8, of two blocks
// that b_interleave has put side by side (with a specialisation of Dots, fast-inl.h).
constexpr int kDotK = 4;
inline void b_interleave(B&, B&) {}

#undef MEMLM_LANES

}  // namespace MEMLM_ISA
}  // namespace memlm
