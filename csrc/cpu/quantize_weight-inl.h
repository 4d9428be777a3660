// Float weights to packed codes, scales and offsets.  memlm/_rounding.py specifies the rounding, to
// the last bit, and says why it is as it is: operations come in its order, and none are fused.
#pragma once
#include "input-inl.h"

namespace memlm {
namespace MEMLM_ISA {

// Clipping candidates, as fractions of the group's range, for 16 levels and for 3 or 4.
constexpr double kShrink16[] = {1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7};
constexpr double kShrink4[] = {1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4};
constexpr int kMostGroup = 128;
constexpr float kMinNormal = 0x1p-126f;

inline F f_negative(F x) { return f_sub(f_zero(), x); }

// Levels that are consecutive numbers.
struct Numbers {
  float first, last;
  int32_t zero;  // the code of 0
  double reach() const { return first == 0 ? last / 2 : -first >= last ? first : last; }
  F clip(F x) const { return f_max(f_min(x, f_set1(last)), f_set1(first)); }
  F nearest(F x) const { return f_from_i(f_round(clip(x))); }
  I code(F x) const { return i_add(f_round(clip(x)), i_set1(zero)); }
};

// 16 levels in any ascending order, with bounds halfway between them.
struct TableLevels {
  Table levels, after4, after2, after1;  // bounds: entry c of after4 lies behind level c + 3
  float middle;                          // behind level 7
  double end;
  explicit TableLevels(const float* p)
      : levels(t_load(p)), end(fabsf(p[0]) >= fabsf(p[15]) ? p[0] : p[15]) {
    float bounds[15 + 3 + 1] = {};
    for (int i = 0; i < 15; ++i) bounds[i] = (p[i + 1] + p[i]) / 2;
    middle = bounds[7];
    after4 = t_load(bounds + 3);
    after2 = t_load(bounds + 1);
    after1 = t_load(bounds);
  }
  double reach() const { return end; }
  I code(F x) const {  // how many bounds lie below x: 8, 4, 2, 1 more
    I code = i_add_if_less(i_zero(), f_set1(middle), x, 8);
    code = i_add_if_less(code, t_lookup(after4, code), x, 4);
    code = i_add_if_less(code, t_lookup(after2, code), x, 2);
    return i_add_if_less(code, t_lookup(after1, code), x, 1);
  }
  F nearest(F x) const { return t_lookup(levels, code(x)); }
};

inline F inverse_or_zero(F s) {
  const F size = f_max(s, f_negative(s));
  return f_if_less(size, f_set1(kMinNormal), f_zero(), f_div(f_set1(1.0f), s));
}

// What scales and offsets become where they are stored.
struct StoredAs {
  memlm_dtype dtype;
  F round(F x) const {
    if (dtype == MEMLM_F32) return x;
    alignas(64) uint16_t half[16];
    f_store_f16(half, x);
    return f_load_f16(half);
  }
  void store(void* p, int64_t i, F x) const {
    if (dtype == MEMLM_F32)
      f_store(static_cast<float*>(p) + i, x);
    else
      f_store_f16(static_cast<uint16_t*>(p) + i, x);
  }
};

// What a group w [span][16] reaches to, in each row: top from the middle on.
struct Range {
  F top, middle;
};

template <bool kOffsets>
inline Range range_of(const float* w, int span) {
  F low = f_load(w), high = low;
  for (int j = 1; j < span; ++j) {
    low = f_min(f_load(w + j * kTileRows), low);
    high = f_max(f_load(w + j * kTileRows), high);
  }
  if (!kOffsets) return {f_if_less(high, f_negative(low), low, high), f_zero()};
  low = f_mul(low, f_set1(0.5f));
  high = f_mul(high, f_set1(0.5f));
  return {f_sub(high, low), f_add(low, high)};
}

// The numbers that a group is computed in: powers of two, about the middle.
struct Unit {
  F unit, inverse, middle;
  explicit Unit(const Range& range) : middle(range.middle) {
    const F power = f_power_of_two(range.top);
    unit = f_max(f_min(power, f_set1(1 / kMinNormal)), f_set1(kMinNormal));
    inverse = f_div(f_set1(1.0f), unit);
  }
};

template <bool kOffsets>
inline void normalise(float* w, int span, const Unit& u) {
  for (int j = 0; j < span; ++j) {
    const F x = f_load(w + j * kTileRows);
    f_store(w + j * kTileRows, f_mul(kOffsets ? f_sub(x, u.middle) : x, u.inverse));
  }
}

// Scale and offset of one group of each row.
struct Affine {
  F s, o;
};

template <bool kOffsets>
inline Affine stored(const Unit& u, StoredAs as, Affine a) {
  return {as.round(f_mul(a.s, u.unit)),
          kOffsets ? as.round(f_add(f_mul(a.o, u.unit), u.middle)) : f_zero()};
}

template <bool kOffsets>
inline Affine loaded(const Unit& u, Affine a) {
  return {f_mul(a.s, u.inverse), kOffsets ? f_mul(f_sub(a.o, u.middle), u.inverse) : f_zero()};
}

// Where weights lie among the levels.
template <bool kOffsets>
struct Positions {
  F inverse, o;
  explicit Positions(Affine a) : inverse(inverse_or_zero(a.s)), o(a.o) {}
  F from_offset(F w) const { return kOffsets ? f_sub(w, o) : w; }
  F scaled(F x) const { return f_mul(x, inverse); }
  F operator()(F w) const { return scaled(from_offset(w)); }
};

template <bool kOffsets, class Levels>
inline F squared_error(const Levels& levels, const float* w, int span, Affine a) {
  const Positions<kOffsets> at(a);
  F sum = f_zero();
  for (int j = 0; j < span; ++j) {
    const F x = at.from_offset(f_load(w + j * kTileRows));
    const F error = f_sub(f_mul(levels.nearest(at.scaled(x)), a.s), x);
    sum = f_add(sum, f_mul(error, error));
  }
  return sum;
}

// Least squares for scale and offset, given the codes that a rounds to.
template <bool kOffsets, class Levels>
inline Affine refined(const Levels& levels, const float* w, int span, F total, Affine a) {
  const Positions<kOffsets> at(a);
  F dot = f_zero(), squares = f_zero(), count = f_zero();
  for (int j = 0; j < span; ++j) {
    const F x = f_load(w + j * kTileRows);
    const F value = levels.nearest(at(x));
    dot = f_add(dot, f_mul(x, value));
    squares = f_add(squares, f_mul(value, value));
    if (kOffsets) count = f_add(count, value);
  }
  if (!kOffsets) return {f_mul(dot, inverse_or_zero(squares)), f_zero()};
  const F share = f_set1(1.0f / static_cast<float>(span)), mean = f_mul(count, share);
  dot = f_sub(dot, f_mul(total, mean));
  squares = f_sub(squares, f_mul(count, mean));
  const F s = f_mul(dot, inverse_or_zero(squares));
  return {s, f_sub(f_mul(total, share), f_mul(s, mean))};
}

// The scale and offset, as stored, with the least squared error that were found for a group
// w [span][16] in its unit, of which top is the end.
template <bool kOffsets, class Levels>
inline Affine search(const Levels& levels, const float* w, int span, F top, const Unit& u,
                     StoredAs as, const double (&shrinks)[7]) {
  F total = f_zero();
  if (kOffsets)
    for (int j = 0; j < span; ++j) total = f_add(total, f_load(w + j * kTileRows));
  const auto scale = [&](double shrink) {
    return f_mul(top, f_set1(static_cast<float>(shrink / levels.reach())));
  };
  Affine best = stored<kOffsets>(u, as, {scale(1.0), f_negative(top)});
  F least = f_set1(INFINITY);
  const auto consider = [&](Affine found) {
    const F error = squared_error<kOffsets>(levels, w, span, loaded<kOffsets>(u, found));
    best.s = f_if_less(error, least, found.s, best.s);
    if (kOffsets) best.o = f_if_less(error, least, found.o, best.o);
    least = f_if_less(error, least, error, least);
  };
  consider(best);
  for (double shrink : shrinks) {
    const Affine start = {scale(shrink), f_mul(top, f_set1(static_cast<float>(-shrink)))};
    consider(stored<kOffsets>(u, as, refined<kOffsets>(levels, w, span, total, start)));
  }
  return best;
}

// The largest magnitude of a row, as its bits.
inline int32_t largest_bits(const void* row, memlm_dtype dtype, int64_t k) {
  I largest = i_zero();
  for (int64_t i = 0; i < k; i += 16)
    largest = i_max(largest, f_magnitude_bits(load_floats(row, dtype, i, k - i < 16 ? k - i : 16)));
  return i_reduce_max(largest);
}

// Some rows of one tile of W, where they are read.
struct TileRows {
  const memlm_quantize_args& args;
  int64_t row;
  int count;

  const char* at(int r) const {
    return static_cast<const char*>(args.w) +
           (row + r) * args.w_stride * (args.dtype == MEMLM_F32 ? 4 : 2);
  }
  // 1 for each row, 0 beyond.
  F real() const {
    alignas(64) float ones[kTileRows] = {};
    for (int r = 0; r < count; ++r) ones[r] = 1;
    return f_load(ones);
  }
  // Columns k0 .. k0 + span - 1 as w [span][16]: zeros beyond the rows, and beyond k, where `repeat`
  // repeats the last column instead.
  void load(int64_t k0, int span, bool repeat, float* w) const {
    const int given = static_cast<int>(args.k - k0 < span ? args.k - k0 : span);
    for (int j = 0; j < given; j += 16) {
      const int some = given - j < 16 ? given - j : 16;
      F x[kTileRows];
      for (int r = 0; r < kTileRows; ++r)
        x[r] = r < count ? load_floats(at(r), args.dtype, k0 + j, some) : f_zero();
      f_transpose(x);
      for (int i = 0; i < 16; ++i) f_store(w + (j + i) * kTileRows, f_add(x[i], f_zero()));
    }
    for (int j = given; j < span; ++j)
      f_store(w + j * kTileRows, repeat ? f_load(w + (given - 1) * kTileRows) : f_zero());
  }
  // Of each row.
  F largest() const {
    alignas(64) float lanes[kTileRows] = {};
    for (int r = 0; r < count; ++r) {
      const int32_t bits = largest_bits(at(r), args.dtype, args.k);
      memcpy(&lanes[r], &bits, 4);
    }
    return f_load(lanes);
  }
};

// Where code j of a block stands in its lane.
template <int kBits>
constexpr int code_shift(int j) { return j % kLaneK * 8 + j / kLaneK * kBits; }

// The block of codes code(0), code(1), ..., from J on.
template <int kBits, int J = 0, class Code>
inline I block_of(const Code& code) {
  I lanes = code(J);
  if constexpr (kBits == 8) lanes = i_and(lanes, i_set1(0xff));  // of negative ones
  lanes = i_shift_left<code_shift<kBits>(J)>(lanes);
  if constexpr (J + 1 < 32 / kBits) lanes = i_or(lanes, block_of<kBits, J + 1>(code));
  return lanes;
}

// Rounds w [span][16] with these scales and offsets, and stores the codes; 0 where `lanes` has no
// bits and from column `columns` on.
template <int kBits, bool kOffsets, class Levels>
inline void round_group(const Levels& levels, const float* w, int span, Affine a, I lanes,
                        int64_t columns, uint8_t* out) {
  constexpr int kBlockK = 32 / kBits;
  const Positions<kOffsets> at(a);
  for (int k = 0; k < span; k += kBlockK) {
    const auto code = [&](int j) { return levels.code(at(f_load(w + (k + j) * kTileRows))); };
    uint32_t mask = columns - k < kBlockK ? 0 : ~0u;
    for (int j = 0; j < columns - k && ~mask; ++j)
      mask |= ((1u << kBits) - 1) << code_shift<kBits>(j);
    const I real = i_and(lanes, i_set1(static_cast<int32_t>(mask)));
    const I block = i_and(block_of<kBits>(code), real);
    memcpy(out, &block, kBlock);
    out += kBlock;
  }
}

// Rows 16 tile .. 16 tile + 15.
template <int kBits, bool kOffsets, class Levels>
inline void quantize_tile(const Levels& levels, const memlm_quantize_args& args, int64_t tile) {
  const int64_t padded = padded_k(args.k, args.group), group = args.group ? args.group : padded;
  const int64_t left = args.n - tile * kTileRows;
  const int count = static_cast<int>(left < kTileRows ? left : kTileRows);
  const TileRows rows = {args, tile * kTileRows, count};
  const F real = rows.real();
  const I lanes = f_round(f_negative(real));
  const StoredAs as = {args.scale_dtype};
  uint8_t* codes = static_cast<uint8_t*>(args.codes) + tile * tile_bytes(kBits, padded);
  alignas(64) float w[kMostGroup * kTileRows];
  for (int64_t g = 0; g < padded / group; ++g) {
    const int span = static_cast<int>(args.group ? group : kActGroup);
    const int64_t at = (tile * (padded / group) + g) * kTileRows;
    if (args.group) rows.load(g * group, span, kOffsets, w);
    const Range range = args.group ? range_of<kOffsets>(w, span) : Range{rows.largest(), f_zero()};
    const Unit u(range);
    const F top = f_mul(range.top, u.inverse);
    Affine best;
    if constexpr (kBits == 8) {
      const F scale = f_div(f_max(top, f_negative(top)), f_set1(127.0f));
      best = stored<false>(u, as, {scale, f_zero()});
    } else {
      normalise<kOffsets>(w, span, u);
      best = search<kOffsets>(levels, w, span, top, u, as, kBits == 4 ? kShrink16 : kShrink4);
    }
    as.store(args.scales, at, f_if_less(f_zero(), real, best.s, f_zero()));
    if (kOffsets) as.store(args.offsets, at, f_if_less(f_zero(), real, best.o, f_zero()));
    const Affine a = loaded<kOffsets>(u, best);
    for (int64_t k = g * group; k < (g + 1) * group; k += span) {
      if (!args.group) rows.load(k, span, false, w);
      if (kBits == 8) normalise<kOffsets>(w, span, u);
      round_group<kBits, kOffsets>(levels, w, span, a, lanes, args.k - k,
                                   codes + tile_bytes(kBits, k));
    }
  }
}

template <int kBits, bool kOffsets, class Levels>
inline void quantize_tiles(const Levels& levels, const memlm_quantize_args& args, int64_t begin,
                           int64_t end) {
  for (int64_t tile = begin; tile < end; ++tile)
    quantize_tile<kBits, kOffsets>(levels, args, tile);
}

inline void quantize_weight(const memlm_quantize_args& args, int64_t begin, int64_t end) {
  if (args.bits == 8)
    quantize_tiles<8, false>(Numbers{-127, 127, 0}, args, begin, end);
  else if (args.levels)
    quantize_tiles<4, false>(TableLevels(args.levels), args, begin, end);
  else if (args.bits == 4 && args.offsets)
    quantize_tiles<4, true>(Numbers{0, 15, 0}, args, begin, end);
  else if (args.bits == 4)
    quantize_tiles<4, false>(Numbers{-8, 7, 8}, args, begin, end);
  else if (args.offsets)
    quantize_tiles<2, true>(Numbers{0, 3, 0}, args, begin, end);
  else
    quantize_tiles<2, false>(Numbers{-1, args.ternary ? 1.0f : 2.0f, 1}, args, begin, end);
}

}  // namespace MEMLM_ISA
}  // namespace memlm
