// 8-bit weights and activations with one scale per row each: the sum over all k is one integer.
#pragma once
#include "accurate-inl.h"
#include "input-inl.h"
#include "weights-inl.h"

namespace memlm {
namespace MEMLM_ISA {

inline I i_load(const float* sums) { I x; memcpy(&x, sums, sizeof x); return x; }
inline void i_store(float* sums, I x) { memcpy(sums, &x, sizeof x); }

// A packed row's scale and where its integer sums start, behind the codes of a register tile.
struct RowEnds {
  char* p;
  int mt;
  float& scale(int lane) const { return reinterpret_cast<float*>(p)[lane]; }
  int32_t& start(int lane) const { return reinterpret_cast<int32_t*>(p)[mt + lane]; }
};

template <class W>
struct PerRow {
  using Unit = NoUnit;
  static constexpr bool kTiles = false, kIntegers = true;
  static constexpr bool kUnpacks = false;  // dot takes the codes, or their bytes flipped, as they are
  static constexpr int kDirectTiles = 0;
  static constexpr int64_t kPanelBytesPerK = kTileRows;  // nothing is unpacked, but stretches are cut

  // Packed x, per register tile of mt rows: int8 codes [K / 4][mt][4] | f32 scale [mt] |
  // int32 -kDotBias * sum [mt]
  static constexpr int64_t row_bytes(int64_t padded) { return padded + 4 + 4; }
  static RowEnds ends(const char* x_tile, int64_t padded, int mt) {
    return {const_cast<char*>(x_tile) + padded * mt, mt};
  }

  static void pack(const Input& in, int64_t row, int64_t k, int64_t padded, int mt, int lane,
                   float* buffer, char* x_tile) {
    const RowEnds end = ends(x_tile, padded, mt);
    end.start(lane) = 0;
    quantize_row(in, row, k, padded, buffer, [&](int64_t i, const int8_t* q, float scale, int32_t sum) {
      for (int j = 0; j < kActGroup; j += kLaneK)
        memcpy(x_tile + (i + j) * mt + lane * kLaneK, q + j, kLaneK);
      if (i == 0) end.scale(lane) = scale;
      end.start(lane) -= W::kDotBias * sum;
    });
  }

  static void start(const char* x_tile, int64_t padded, int mt, float* sums) {
    const RowEnds end = ends(x_tile, padded, mt);
    for (int m = 0; m < mt; ++m) i_store(sums + m * kTileRows, i_set1(end.start(m)));
  }

  template <int MT>
  static void direct(const Stretch<W>& s, const char* x, float* sums) {
    constexpr int kChains = chains(MT);
    I v[MT][kChains];
    for (int m = 0; m < MT; ++m)
      for (int c = 0; c < kChains; ++c) v[m][c] = c ? i_zero() : i_load(sums + m * kTileRows);
    const uint8_t* codes = s.codes;
    const int8_t* q = reinterpret_cast<const int8_t*>(x) + s.runs[0] * kActGroup * MT;
    for (int64_t i = 0; i < s.subs; ++i) {
      prefetch(codes, tile_bytes(W::kBits, kActGroup));
#pragma GCC unroll 1
      for (int j = 0; j < 4; j += 2, q += 4 * MT * kLaneK)
        for (int h = 0; h < 2; ++h) {
          B b0, b1;
          s.codec.load2(codes, j + h, b0, b1);
          const int8_t* at = q + 2 * h * MT * kLaneK;
          for (int m = 0; m < MT; ++m) {
            I& even = v[m][2 * h % kChains];
            even = W::dot(even, b0, at + m * kLaneK);
          }
          for (int m = 0; m < MT; ++m) {
            I& odd = v[m][(2 * h + 1) % kChains];
            odd = W::dot(odd, b1, at + (MT + m) * kLaneK);
          }
        }
      codes += tile_bytes(W::kBits, kActGroup);
    }
    for (int m = 0; m < MT; ++m) {
      I total = v[m][0];
      for (int c = 1; c < kChains; ++c) total = i_add(total, v[m][c]);
      i_store(sums + m * kTileRows, total);
    }
  }

  static F finish(const Stretch<W>& s, const char* x_tile, int64_t padded, int mt, int row,
                  const float* sums) {
    const F scale = f_mul(s.scale(0), f_set1(ends(x_tile, padded, mt).scale(row)));
    return f_mul(f_from_i(i_load(sums)), scale);
  }
};

}  // namespace MEMLM_ISA
}  // namespace memlm
