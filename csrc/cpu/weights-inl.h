// How the kernels read packed weights (memlm/formats.py draws them).
//
// A weight type (w2_matmul-inl.h, w4_matmul-inl.h, w8_matmul-inl.h) says what codes mean:
//   kBits; kOffsets: has offsets; kZero: what to subtract from a code, where there are none;
//   kDotBias: the same for what load2 gives, in integer sums
//   kUnit: in integer sums a weight is the scale times `unit` times the code
//   kUnpacks: prefill unpacks codes into bytes (else it reads them where they are)
//   kCompressed: codes are read through a Cursor (compressed-inl.h) only, and always unpacked
//   kScaled: has scales; without, the codes are floats
//   Sums: the integer sums of 16 rows; start(x), dot(sums, block, x), total(sums, x): x is added
//   load2(p, i, b0, b1): blocks 2i and 2i+1 of the 32 k at p
//   kLoadK, LoadIndices: the k in 64 bytes of codes; weight<j>(block): the code at k + j, as float
#pragma once
#include "../formats.h"
#include "../include/memlm.h"

namespace memlm {
namespace MEMLM_ISA {

// What a mode switches on in each thread.
struct NoUnit { NoUnit() {} };

struct Scales {
  const void* p;
  bool f16;
  F load(int64_t i) const {
    return f16 ? f_load_f16(static_cast<const uint16_t*>(p) + i)
               : f_load(static_cast<const float*>(p) + i);
  }
};

// How many k of a tile are stored.
inline int64_t stored_k(const memlm_packed& w, int64_t tile, int64_t padded) {
  return w.pattern == MEMLM_BLOCKS ? (w.starts[tile + 1] - w.starts[tile]) * kActGroup : padded;
}

// Which 32 k of x each of some runs of codes is multiplied with.
struct Runs {
  int64_t count, first;
  const int32_t* at;  // of blocks; NULL: one after the other
  int64_t operator[](int64_t i) const { return at ? at[i] : first + i; }
};

// The codes of one tile, packed: the stored k from the k0th to the k1th, in runs of 32.
template <class W>
struct Stretch {
  const W& codec;
  const uint8_t* codes;
  Scales scales, offsets;
  int64_t scale_index;  // of the first group
  int64_t groups;       // scales in the stretch
  int64_t subs;         // runs of 32 k per scale
  Runs runs;
  const uint8_t* places = nullptr;  // of compressed codes
  const uint8_t* end = nullptr;     // of unstructured codes

  // at: where the codes begin, of compressed ones after k0; else not looked at.
  Stretch(const W& codec, const memlm_packed& w, int64_t tile, int64_t k0, int64_t k1,
          const uint8_t* at = nullptr)
      : codec(codec), runs{(k1 - k0) / kActGroup, k0 / kActGroup, nullptr} {
    const int64_t padded = padded_k(w.k, w.group);
    codes = static_cast<const uint8_t*>(w.codes);
    scales = {w.scales, w.scale_dtype == MEMLM_F16};
    offsets = {w.offsets, w.scale_dtype == MEMLM_F16};
    if (w.pattern == MEMLM_BLOCKS) {
      const int64_t stored = w.starts[tile + 1];
      const auto block = [&](int64_t k) {
        const int64_t i = w.starts[tile] + k / kActGroup;
        return i < stored ? i : stored;
      };
      codes += tile_bytes(W::kBits, block(k0) * kActGroup);
      groups = block(k1) - block(k0);
      runs = {groups, 0, static_cast<const int32_t*>(w.places) + block(k0)};
      scale_index = block(k0) * kTileRows;
      subs = 1;
      return;
    }
    if constexpr (W::kCompressed) {
      const int64_t block = (tile * padded + k0) / kLaneK;
      places = static_cast<const uint8_t*>(w.places) + block * kPlaceBytes;
      if (w.pattern == MEMLM_TWO_OF_FOUR) {
        codes += block * kTileRows;
      } else {
        end = codes + w.starts[tile + 1];
        codes = at ? at : codes + w.starts[tile];
      }
    } else {
      codes += tile * tile_bytes(W::kBits, padded) + tile_bytes(W::kBits, k0);
    }
    if (w.group) {
      scale_index = (tile * (padded / w.group) + k0 / w.group) * kTileRows;
      groups = (k1 - k0) / w.group;
      subs = w.group / kActGroup;
    } else {
      scale_index = tile * kTileRows;
      groups = 1;
      subs = runs.count;
    }
  }
  F scale(int64_t g) const {
    return W::kScaled ? scales.load(scale_index + g * kTileRows) : f_set1(1.0f);
  }
  F offset(int64_t g) const {
    if (!W::kScaled) return f_zero();
    return W::kOffsets ? offsets.load(scale_index + g * kTileRows)
                       : f_mul(scale(g), f_set1(-W::kZero));
  }
  // Of integer sums.
  F dot_scale(int64_t g) const {
    if constexpr (W::kUnit) return f_mul(scale(g), f_set1(codec.unit));
    return scale(g);
  }
  F dot_offset(int64_t g) const { return W::kOffsets ? offset(g) : f_zero(); }
};

// Integer sums of codes of 2 and 4 bits, which are numbers from 0 up.
template <bool kHasOffsets, int kZeroPoint>
struct UnsignedSums {
  using Arithmetic = UnsignedSums;
  static constexpr int kZero = kZeroPoint, kDotBias = kHasOffsets ? 0 : kZeroPoint;
  static constexpr bool kOffsets = kHasOffsets, kUnit = false, kScaled = true;
  using Sums = Pairs;
  static Sums start(int32_t x) { return pairs_start(x); }
  static Sums dot(Sums acc, B w, const int8_t* x) { return pairs_dot_u4(acc, w, x); }
  static I total(Sums acc, int32_t start) { return pairs_sum(acc, start); }
};

// Integer sums of signed bytes, after b_bias.
struct SignedSums {
  using Arithmetic = SignedSums;
  static constexpr int kZero = 0, kDotBias = kSignedBias;
  static constexpr bool kOffsets = false, kScaled = true;
  using Sums = I;
  static Sums start(int32_t x) { return i_set1(x); }
  static Sums dot(Sums acc, B w, const int8_t* x) { return i_dot_s8(acc, w, x); }
  static I total(Sums acc, int32_t) { return acc; }
};

// How far ahead of the codes in use to ask for more: the hardware's prefetcher stops at the end of a
// 4 KB page, and this starts on the next one in time.  First into the L2, since the L1 can wait for 10
// to 16 lines only, then into the L1; on an Intel Xeon 8 and 4 % less time than the one before, with
// 12 to 25 % for any of them on Zen 4.  Nearer (1, 2 KB) and further (4 to 16 KB) gave less.
constexpr int64_t kPrefetchL2 = 3072, kPrefetchL1 = 1024;

inline void prefetch(const uint8_t* codes, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kBlock) {
    __builtin_prefetch(codes + kPrefetchL2 + i, 0, 2);
    __builtin_prefetch(codes + kPrefetchL1 + i, 0, 3);
  }
}

template <int... J>
struct Indices {};

// compressed-inl.h
template <class W, class Use>
const uint8_t* each_expanded(const Stretch<W>& s, Use&& use);

// Calls use(j, weights at k + j) for the k of one load of packed codes.  Inlined always: called, it
// would keep the sums that `use` adds to in memory.
template <class W, class Use, int... J>
__attribute__((always_inline)) inline void each_weight(const W& codec, const uint8_t* codes, F scale,
                                                       F offset, Use&& use, Indices<J...>) {
  if constexpr (W::kScaled) {
    const B b = b_load(codes);
    // With offset = -kZero * scale the FMA is exact wherever the product is; see numerics in tests.
    (use(J, f_fma(codec.template weight<J>(b), scale, offset)), ...);
  } else {
    (use(J, W::load(codes, J)), ...);
  }
}

// Bytes of codes that hold kLoadK k of a tile.
template <class W>
constexpr int64_t kLoadBytes = tile_bytes(W::kBits, W::kLoadK);

// Calls use(k - k0, j, weights at k), in order, for all stored k of a stretch; j is k modulo kLoadK, a
// constant.  Returns where the codes end.
template <class W, class Use>
inline const uint8_t* each_weight(const Stretch<W>& s, Use&& use) {
  if constexpr (W::kCompressed) {
    return each_expanded(s, use);
  } else {
    const uint8_t* codes = s.codes;
    int64_t k = 0;
    for (int64_t g = 0; g < s.groups; ++g) {
      const F scale = s.scale(g), offset = s.offset(g);
      for (int64_t i = 0; i < s.subs * kActGroup / W::kLoadK; ++i) {
        prefetch(codes, kLoadBytes<W>);
        each_weight(s.codec, codes, scale, offset, [&](int j, F w) { use(k + j, j, w); },
                    typename W::LoadIndices());
        codes += kLoadBytes<W>;
        k += W::kLoadK;
      }
    }
    return codes;
  }
}

}  // namespace MEMLM_ISA
}  // namespace memlm
