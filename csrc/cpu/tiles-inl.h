// Products of many rows on a CPU's tile unit (vec_amx.h): 32 rows of x by 32 rows of W at a time.
//
//                w0      w1          x and w are tiles of 16 x 64 bytes, one after the other along
//              +-----+ +-----+       k; the four tiles of sums stay in registers over a stretch of
//   x0 +-----+ | s0  | | s1  |       k.  Eight registers: 4 sums, 2 x, 2 w.  Each product (16
//      +-----+ +-----+ +-----+       cycles) needs one load (16 rows, two a cycle).
//   x1 +-----+ | s2  | | s3  |
//      +-----+ +-----+ +-----+
#pragma once
#include "input-inl.h"
#include "per_row-inl.h"
#include "weights-inl.h"

namespace memlm {
namespace MEMLM_ISA {

constexpr int kTileX = 16;  // rows of x in a tile

static constexpr int64_t whole_tiles(int64_t m) { return div_up(m, kTileX) * kTileX; }

// Numbers cut into parts of one tile each, and the products of parts that are added up.
struct Term { int x, w; };

// To the nearest bf16.
struct OneBf16 {
  static constexpr bool kPanel = true;
  static constexpr int kParts = 1, kTerms = 1;
  static constexpr Term kTerm[] = {{0, 0}};
  template <int S, int X, int W>
  static void dot() { tile_dot_bf16<S, X, W>(); }
};
// All 24 bits of a float in three bf16 (x = x0 + x1 + x2 exactly, down to bf16's smallest normal
// number).  The products left out are below 2^-24 of x w, as the rounding of an f32 product is.
struct ThreeBf16 {
  static constexpr bool kPanel = true;
  static constexpr int kParts = 3, kTerms = 6;
  static constexpr Term kTerm[] = {{0, 0}, {0, 1}, {0, 2}, {1, 0}, {1, 1}, {2, 0}};
  template <int S, int X, int W>
  static void dot() { tile_dot_bf16<S, X, W>(); }
};
struct OneInt8 {
  static constexpr bool kPanel = false;
  static constexpr int kParts = 1, kTerms = 1;
  static constexpr Term kTerm[] = {{0, 0}};
  template <int S, int X, int W>
  static void dot() { tile_dot_s8<S, X, W>(); }
};

// A panel passes by: streamed, it leaves the L1 to x.  Packed weights come from memory, and are to
// stay in the L2 for the next rows of x.
template <class T, int N>
inline void tile_load_w(const void* p) {
  if (T::kPanel) {
    tile_stream<N>(p);
  } else {
    tile_load<N>(p);
  }
}

// Two tiles of x or W: consecutive steps along k, each of kParts tiles.
struct TilePair {
  const char *first, *second;
};

template <class T, bool kTwoX, bool kTwoW, int I = 0>
inline void add_terms(TilePair x, TilePair w) {
  constexpr Term term = T::kTerm[I], last = T::kTerm[I ? I - 1 : 0];
  if constexpr (I == 0 || term.x != last.x) {
    tile_load<4>(x.first + term.x * kTileBytes);
    if (kTwoX) tile_load<5>(x.second + term.x * kTileBytes);
  }
  if constexpr (I == 0 || term.w != last.w) {
    tile_load_w<T, 6>(w.first + term.w * kTileBytes);
    if (kTwoW) tile_load_w<T, 7>(w.second + term.w * kTileBytes);
  }
  T::template dot<0, 4, 6>();
  if (kTwoX) T::template dot<2, 5, 6>();
  if (kTwoW) T::template dot<1, 4, 7>();
  if (kTwoX && kTwoW) T::template dot<3, 5, 7>();
  if constexpr (I + 1 < T::kTerms) add_terms<T, kTwoX, kTwoW, I + 1>(x, w);
}

// Adds the products over `steps` tiles along k to the sums: [rows][16] of the first tile of W, and,
// sums_next further on, of the second.
template <class T, bool kTwoX, bool kTwoW>
inline void multiply_tiles(TilePair x, TilePair w, int64_t steps, float* sums, int64_t sums_next) {
  constexpr int64_t kNextX = kTileX * kTileRows, kStep = T::kParts * kTileBytes;
  tile_load<0>(sums);
  if (kTwoW) tile_load<1>(sums + sums_next);
  if (kTwoX) tile_load<2>(sums + kNextX);
  if (kTwoX && kTwoW) tile_load<3>(sums + sums_next + kNextX);
  for (int64_t i = 0; i < steps * kStep; i += kStep)
    add_terms<T, kTwoX, kTwoW>({x.first + i, x.second + i}, {w.first + i, w.second + i});
  tile_store<0>(sums);
  if (kTwoW) tile_store<1>(sums + sums_next);
  if (kTwoX) tile_store<2>(sums + kNextX);
  if (kTwoX && kTwoW) tile_store<3>(sums + sums_next + kNextX);
}

template <class T>
inline void multiply_tiles(TilePair x, bool two_x, TilePair w, bool two_w, int64_t steps, float* sums,
                           int64_t sums_next) {
  const auto f = two_x ? two_w ? multiply_tiles<T, true, true> : multiply_tiles<T, true, false>
                       : two_w ? multiply_tiles<T, false, true> : multiply_tiles<T, false, false>;
  f(x, w, steps, sums, sums_next);
}

// Both modes of arithmetic on numbers: T is OneBf16 (fast) or ThreeBf16 (accurate).
template <class W, class T>
struct Bf16Tiles {
  using Unit = TileUnit;
  static constexpr bool kTiles = true, kUnpacks = true, kIntegers = false;
  static constexpr int64_t kStepK = 32;  // k in a tile
  // Panel, per 32 k: T::kParts tiles [16][16][2] of pairs of k.  Packed x, per 16 rows and 32 k:
  // T::kParts tiles [16][32].
  static constexpr int64_t kPanelBytesPerK = T::kParts * kTileBytes / kStepK;
  static constexpr int64_t row_bytes(int64_t padded) { return padded * 2 * T::kParts; }
  static constexpr int64_t bytes_before(int64_t k0, int) { return row_bytes(k0) * kTileX; }

  // Cuts x and y, 16 numbers each, and calls use(part, 32 bf16).
  template <class Use>
  static void cut(F x, F y, const Use& use) {
    for (int part = 0; part + 1 < T::kParts; ++part) {
      const F cut_x = f_cut_to_bf16(x), cut_y = f_cut_to_bf16(y);
      use(part, bf16_exact(cut_x, cut_y));
      x = f_sub(x, cut_x);
      y = f_sub(y, cut_y);
    }
    use(T::kParts - 1, bf16_round(x, y));
  }

  static void pack(const Input& in, int64_t row, int64_t k, int64_t padded, int, int lane,
                   float* buffer, char* x_tile) {
    const float* x = input_row(in.args, row, k, padded, buffer);
    char* out = x_tile + lane / kTileX * kTileX * row_bytes(padded) + lane % kTileX * 64;
    for (int64_t i = 0; i < padded; i += kStepK, out += T::kParts * kTileBytes)
      cut(f_finite_or_nan(f_load(x + i)), f_finite_or_nan(f_load(x + i + 16)),
          [out](int part, B numbers) { b_store(out + part * kTileBytes, numbers); });
  }

  static const uint8_t* unpack(const Stretch<W>& s, char* panel) {
    F even = f_zero();
    return each_weight(s, [&](int64_t k, int j, F w) {
      if (j % 2 == 0) {
        even = w;
        return;
      }
      char* out = panel + k / kStepK * T::kParts * kTileBytes + k % kStepK / 2 * kBlock;
      cut(even, w, [out](int part, B numbers) {
        b_store(out + part * kTileBytes, bf16_pairs(numbers));
      });
    });
  }

  static void start(const char*, int64_t, int mt, float* sums) {
    memset(sums, 0, sizeof(float) * mt * kTileRows);
  }

  // x times `count` tiles of W: sums_next floats lie between the sums of one and the next.
  template <class Block>
  static void multiply(const Block& block, int64_t count, const char* x, int64_t padded, int mt,
                       float* sums, int64_t sums_next) {
    const TilePair xs = {x, x + kTileX * row_bytes(padded)};
    const int64_t steps = (block.k1 - block.k0) / kStepK;
    for (int64_t i = 0; i < count; i += 2)
      multiply_tiles<T>(xs, mt > kTileX, {block.panel(i), block.panel(i + 1)}, i + 1 < count, steps,
                        sums + i * sums_next, sums_next);
  }
};

// As PerRow: whole integer sums.
template <class W>
struct PerRowTiles {
  using Unit = TileUnit;
  static constexpr bool kTiles = true, kUnpacks = false, kIntegers = true;
  static constexpr int64_t kStepK = 64;
  static constexpr int64_t kPanelBytesPerK = kTileRows;  // nothing is unpacked, but stretches are cut

  // Packed x, per 16 rows and 64 k: int8 [16][64]; behind all codes of a register tile f32 scale.
  static constexpr int64_t code_bytes(int64_t padded) { return div_up(padded, kStepK) * kStepK; }
  static constexpr int64_t row_bytes(int64_t padded) { return code_bytes(padded) + 4; }
  static constexpr int64_t bytes_before(int64_t k0, int) { return k0 * kTileX; }
  static float& scale(const char* x_tile, int64_t padded, int mt, int lane) {
    const char* scales = x_tile + whole_tiles(mt) * code_bytes(padded);
    return reinterpret_cast<float*>(const_cast<char*>(scales))[lane];
  }

  static void pack(const Input& in, int64_t row, int64_t k, int64_t padded, int mt, int lane,
                   float* buffer, char* x_tile) {
    char* out = x_tile + lane / kTileX * kTileX * code_bytes(padded) + lane % kTileX * 64;
    if (padded % kStepK) memset(out + padded / kStepK * kTileBytes, 0, kStepK);
    quantize_row(in, row, k, padded, buffer, [&](int64_t i, const int8_t* q, float row_scale, int32_t) {
      memcpy(out + i / kStepK * kTileBytes + i % kStepK, q, kActGroup);
      if (i == 0) scale(x_tile, padded, mt, lane) = row_scale;
    });
  }

  static void start(const char*, int64_t, int mt, float* sums) {
    memset(sums, 0, sizeof(float) * mt * kTileRows);
  }

  template <class Block>
  static void multiply(const Block& block, int64_t count, const char* x, int64_t padded, int mt,
                       float* sums, int64_t sums_next) {
    const TilePair xs = {x, x + kTileX * code_bytes(padded)};
    const int64_t k = block.k1 - block.k0, steps = k / kStepK, done = steps * kTileBytes;
    alignas(64) char ends[2][kTileBytes] = {};  // the last 32 k of an odd number of 32 k, and zeros
    for (int64_t i = 0; i < count; i += 2) {
      const bool two = i + 1 < count;
      const char* codes[2];
      for (int j = 0; j < 1 + two; ++j)
        codes[j] = reinterpret_cast<const char*>(block.stretch(i + j).codes);
      if (!two) codes[1] = codes[0];
      float* at = sums + i * sums_next;
      multiply_tiles<OneInt8>(xs, mt > kTileX, {codes[0], codes[1]}, two, steps, at, sums_next);
      if (k % kStepK) {
        for (int j = 0; j < 1 + two; ++j) memcpy(ends[j], codes[j] + done, kTileBytes / 2);
        multiply_tiles<OneInt8>({xs.first + done, xs.second + done}, mt > kTileX, {ends[0], ends[1]},
                                two, 1, at, sums_next);
      }
    }
  }

  static F finish(const Stretch<W>& s, const char* x_tile, int64_t padded, int mt, int row,
                  const float* sums) {
    const F both = f_mul(s.scale(0), f_set1(scale(x_tile, padded, mt, row)));
    return f_mul(f_from_i(i_load(sums)), both);
  }
};

}  // namespace MEMLM_ISA
}  // namespace memlm
