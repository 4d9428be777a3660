// Fast mode: activations rounded to int8 per 32 k, integer products, one f32 FMA per 32 k.
#pragma once
#include "input-inl.h"
#include "compressed-inl.h"
#include "weights-inl.h"

namespace memlm {
namespace MEMLM_ISA {

// The integer sums of MT rows of x, over 32 k.  K is kDotK, or kLaneK; the instruction set that has
// another kDotK specialises this.
template <class W, int MT, int K>
struct Dots {
  typename W::Sums p[MT];
  // start(m): where the sums of row m start.
  template <class Start>
  explicit Dots(const Start& start) {
    for (int m = 0; m < MT; ++m) p[m] = W::start(start(m));
  }
  // Two blocks of weights, and their k of x: int8 [8 / K][MT][K].
  void add(B b0, B b1, const int8_t* x) {
    for (int m = 0; m < MT; ++m) p[m] = W::dot(p[m], b0, x + m * kLaneK);
    for (int m = 0; m < MT; ++m) p[m] = W::dot(p[m], b1, x + (MT + m) * kLaneK);
  }
  I total(int m, int32_t start) const { return W::total(p[m], start); }
};

template <class W, int MT, int K = kDotK>
struct IntegerSums {
  F v[MT];
  explicit IntegerSums(const float* sums) {
    for (int m = 0; m < MT; ++m) v[m] = f_load(sums + m * kTileRows);
  }
  // Adds 32 k: load2(i, b0, b1) gives blocks 2i and 2i + 1 as Dots takes them, x is one record.
  template <class Load>
  void add(const Load& load2, F scale, F offset, const char* x) {
    const char* x_scales = x + kActGroup * MT;
    const auto start = [&](int m) {
      int32_t value = 0;
      if (W::kDotBias) memcpy(&value, x_scales + 4 * (MT + m), 4);
      return value;
    };
    Dots<W, MT, K> dots(start);
    const int8_t* q = reinterpret_cast<const int8_t*>(x);
#pragma GCC unroll 1
    for (int i = 0; i < 4; ++i, q += 2 * MT * kLaneK) {
      B b0, b1;
      load2(i, b0, b1);
      dots.add(b0, b1, q);
    }
    for (int m = 0; m < MT; ++m) {
      float x_scale, offset_factor;
      memcpy(&x_scale, x_scales + 4 * m, 4);
      memcpy(&offset_factor, x_scales + 4 * (MT + m), 4);
      const F dot = f_from_i(dots.total(m, start(m)));
      v[m] = f_fma(f_mul(dot, f_set1(x_scale)), scale, v[m]);
      if (W::kOffsets) v[m] = f_fma(f_set1(offset_factor), offset, v[m]);
    }
  }
  void store(float* sums) const {
    for (int m = 0; m < MT; ++m) f_store(sums + m * kTileRows, v[m]);
  }
};

// Bytes per row of x and 32 k, packed.
constexpr int64_t kFastRecord = kActGroup + 4 + 4;

// Adds the products of a panel of bytes (Fast draws it): one function for all weights whose integer
// sums are the same, A.
template <class A, int MT>
__attribute__((noinline)) void multiply_bytes(const Runs& runs, const char* p, const char* x_tile,
                                              float* sums) {
  constexpr int64_t kScales = 64 * (A::kOffsets ? 2 : 1);
  IntegerSums<A, MT> acc(sums);
  for (int64_t i = 0; i < runs.count; ++i, p += kScales + 8 * kBlock) {
    const char* x = x_tile + runs[i] * kFastRecord * MT;
    if (runs.at && i + 2 < runs.count) {  // jumps, which the hardware does not foresee
      const char* next = x_tile + runs[i + 2] * kFastRecord * MT;
      for (int64_t line = 0; line < kFastRecord * MT; line += 64) __builtin_prefetch(next + line);
    }
    const float* scales = reinterpret_cast<const float*>(p);
    const char* blocks = p + kScales;
    acc.add(
        [&](int j, B& b0, B& b1) {
          b0 = b_load(blocks + 2 * j * kBlock);
          b1 = b_load(blocks + (2 * j + 1) * kBlock);
        },
        f_load(scales), A::kOffsets ? f_load(scales + 16) : f_zero(), x);
  }
  acc.store(sums);
}

template <class W>
struct Fast {
  using Unit = NoUnit;
  static constexpr bool kTiles = false, kIntegers = false;
  static constexpr bool kExpandsDirectly = true;  // compressed codes of a single row, without a panel
  static constexpr bool kUnpacks = W::kUnpacks;
  static constexpr int kDirectTiles = kDirectTilesFast;
  // Panel, per 32 k: f32 scale [16], f32 offset [16] (if any), 8 blocks of codes as bytes.
  static constexpr int64_t kPanelScales = 64 * (W::kOffsets ? 2 : 1);
  static constexpr int64_t kPanelRecord = kPanelScales + 8 * kBlock;
  static constexpr int64_t kPanelBytesPerK = kPanelRecord / kActGroup;

  // Packed x, per register tile of mt rows and 32 k, so that the loop reads one stream:
  //     int8 codes [32 / kDotK][mt][kDotK] | f32 scale [mt] | [mt] of what the sum of the codes is
  //     needed for: with offsets f32 scale * sum, else int32 -kDotBias * sum, where the integer sums
  //     start
  static constexpr int64_t kRecord = kFastRecord;
  static constexpr int64_t row_bytes(int64_t padded) { return padded / kActGroup * kRecord; }

  static void pack(const Input& in, int64_t row, int64_t k, int64_t padded, int mt, int lane,
                   float* buffer, char* record) {
    quantize_row(in, row, k, padded, buffer,
                 [&](int64_t, const int8_t* q, float scale, int32_t sum) {
      for (int j = 0; j < kActGroup / kDotK; ++j)
        memcpy(record + (j * mt + lane) * kDotK, q + j * kDotK, kDotK);
      memcpy(record + kActGroup * mt + 4 * lane, &scale, 4);
      const float offset_factor = scale * static_cast<float>(sum);
      const int32_t start = -W::kDotBias * sum;
      memcpy(record + (kActGroup + 4) * mt + 4 * lane,
             W::kOffsets ? static_cast<const void*>(&offset_factor) : &start, 4);
      record += kRecord * mt;
    });
  }

  static void start(const char*, int64_t, int mt, float* sums) {
    memset(sums, 0, sizeof(float) * mt * kTileRows);
  }

  template <int MT>
  static void direct(const Stretch<W>& s, const char* x, float* sums) {
    // Interleaving does not pay for a single row, whose packed form is the same either way.
    constexpr int K = MT == 1 ? kLaneK : kDotK;
    IntegerSums<W, MT, K> acc(sums);
    Cursor<W> codes(s);
    for (int64_t g = 0; g < s.groups; ++g) {
      const F scale = s.dot_scale(g), offset = s.dot_offset(g);
      for (int64_t i = 0; i < s.subs; ++i) {
        codes.prefetch_run();
        const auto load2 = [&](int j, B& b0, B& b1) { codes.template load2<K>(j, b0, b1); };
        acc.add(load2, scale, offset, x + s.runs[g * s.subs + i] * kRecord * MT);
        codes.next_run();
      }
    }
    acc.store(sums);
  }

  static const uint8_t* unpack(const Stretch<W>& s, char* out) {
    Cursor<W> codes(s);
    for (int64_t g = 0; g < s.groups; ++g) {
      const F scale = s.dot_scale(g), offset = s.dot_offset(g);
      for (int64_t i = 0; i < s.subs; ++i) {
        f_store(reinterpret_cast<float*>(out), scale);
        if (W::kOffsets) f_store(reinterpret_cast<float*>(out) + 16, offset);
        char* blocks = out + kPanelScales;
        codes.prefetch_run();
        for (int j = 0; j < 4; ++j) {
          B b0, b1;
          codes.template load2<kDotK>(j, b0, b1);
          b_store(blocks + 2 * j * kBlock, b0);
          b_store(blocks + (2 * j + 1) * kBlock, b1);
        }
        codes.next_run();
        out += kPanelRecord;
      }
    }
    return codes.codes;
  }

  template <int MT>
  static void panel(const Runs& runs, const char* p, const char* x_tile, float* sums) {
    multiply_bytes<typename W::Arithmetic, MT>(runs, p, x_tile, sums);
  }
};

}  // namespace MEMLM_ISA
}  // namespace memlm
