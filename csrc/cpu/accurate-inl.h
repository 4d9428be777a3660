// Accurate mode: weights are dequantised in registers, products and sums are f32.
#pragma once
#include "input-inl.h"
#include "compressed-inl.h"
#include "weights-inl.h"

namespace memlm {
namespace MEMLM_ISA {

// Sums of one row of x are split over this many chains, so that an FMA's latency (4 cycles, two
// per cycle of two registers each) does not bound a tile with few rows.
static constexpr int chains(int mt) { return mt == 1 ? 4 : mt <= 3 ? 2 : 1; }

template <int MT>
struct FloatSums {
  static constexpr int kChains = chains(MT);
  F v[MT][kChains];
  explicit FloatSums(const float* sums) {
    for (int m = 0; m < MT; ++m) {
      v[m][0] = f_load(sums + m * kTileRows);
      for (int c = 1; c < kChains; ++c) v[m][c] = f_zero();
    }
  }
  void add(int64_t k, F w, const float* x) {
    for (int m = 0; m < MT; ++m) v[m][k % kChains] = f_fma(w, f_set1(x[m]), v[m][k % kChains]);
  }
  void store(float* sums) const {
    for (int m = 0; m < MT; ++m) {
      F total = v[m][0];
      for (int c = 1; c < kChains; ++c) total = f_add(total, v[m][c]);
      f_store(sums + m * kTileRows, total);
    }
  }
};

// The packed x, f32 [K][MT], from run `run` on.
template <int MT>
inline const float* run_of(int64_t run, const char* x) {
  return reinterpret_cast<const float*>(x) + run * kActGroup * MT;
}

// Adds the products of a panel, whatever it was unpacked from: one function for all types of weights.
template <int MT>
__attribute__((noinline)) void multiply_floats(const Runs& runs, const float* w, const char* x, float* sums) {
  FloatSums<MT> acc(sums);
  for (int64_t i = 0; i < runs.count; ++i) {
    const float* xp = run_of<MT>(runs[i], x);
#pragma GCC unroll 1
    for (int k = 0; k < kActGroup; k += 4)
      for (int j = 0; j < 4; ++j, w += kTileRows, xp += MT) acc.add(j, f_load(w), xp);
  }
  acc.store(sums);
}

template <class W>
struct Accurate {
  using Unit = NoUnit;
  static constexpr bool kTiles = false, kIntegers = false;
  static constexpr bool kExpandsDirectly = false;
  static constexpr bool kUnpacks = true;
  static constexpr int kDirectTiles = kDirectTilesAccurate;
  static constexpr int64_t kPanelBytesPerK = 4 * kTileRows;  // f32 [k][16]

  // Packed x, per register tile of mt rows: f32 [K][mt].
  static constexpr int64_t row_bytes(int64_t padded) { return padded * 4; }

  static void pack(const Input& in, int64_t row, int64_t k, int64_t padded, int mt, int lane,
                   float* buffer, char* packed) {
    const float* x = input_row(in.args, row, k, padded, buffer);
    float* out = reinterpret_cast<float*>(packed) + lane;
    for (int64_t i = 0; i < padded; ++i) out[i * mt] = x[i];
  }

  static void start(const char*, int64_t, int mt, float* sums) {
    memset(sums, 0, sizeof(float) * mt * kTileRows);
  }

  template <int MT>
  static void direct(const Stretch<W>& s, const char* x, float* sums) {
    FloatSums<MT> acc(sums);
    const uint8_t* codes = s.codes;
    for (int64_t g = 0; g < s.groups; ++g) {
      const F scale = s.scale(g), offset = s.offset(g);
      for (int64_t sub = 0; sub < s.subs; ++sub) {
        const float* xp = run_of<MT>(s.runs[g * s.subs + sub], x);
#pragma GCC unroll 1
        for (int i = 0; i < kActGroup / W::kLoadK; ++i) {
          prefetch(codes, kLoadBytes<W>);
          each_weight(s.codec, codes, scale, offset,
                      [&](int j, F w) { acc.add(j, w, xp + j * MT); }, typename W::LoadIndices());
          codes += kLoadBytes<W>;
          xp += W::kLoadK * MT;
        }
      }
    }
    acc.store(sums);
  }

  static const uint8_t* unpack(const Stretch<W>& s, char* panel) {
    float* out = reinterpret_cast<float*>(panel);
    return each_weight(s, [&](int64_t k, int, F w) { f_store(out + k * kTileRows, w); });
  }

  template <int MT>
  static void panel(const Runs& runs, const char* panel, const char* x, float* sums) {
    multiply_floats<MT>(runs, reinterpret_cast<const float*>(panel), x, sums);
  }
};

}  // namespace MEMLM_ISA
}  // namespace memlm
