// The skeleton of y = f(x) W^T + bias + residual over packed weights, shared by w4_matmul and w8_matmul.
//
// One register tile is kTileM rows of x by one tile (16 rows) of W; it runs along k and adds to
// 16 f32 sums per row of x.  Who reads W:
//   decode, m <= kTileM: the tile reads the packed form directly; every byte of W is read once.
//   prefill, m > kTileM: a thread takes up to kBlockTiles tiles of W and a stretch of k, and runs
//     all of x over them; where x has more than kDirectTiles register tiles it unpacks them first,
//     once, into a panel (in its L2).
//
//            k ->                       One thread's work in prefill: a block of tiles, for each
//        +----+----+----+               stretch of k: unpack the panel, then for each kTileM rows
//   W    |::::|    |    | <- block      of x (packed once for all threads) one register tile per
//        |::::|    |    |    of tiles   tile of W.  The f32 sums stay in the thread's workspace
//        +----+----+----+               between stretches.
//          ^ panel
//
// The order of additions never depends on the threads.  It does, in the last bits, on m: through the
// stretches of prefill, and in accurate mode through the chains of a register tile.
#pragma once
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../formats.h"
#include "../include/memlm.h"
#include "input-inl.h"
#include "threads.h"

namespace memlm {
namespace MEMLM_ISA {

// Tiles of W per block in prefill: x is streamed from the L3 once per block, at 64 rows of W per
// byte of x; more would not fit the L2 together with the panel's stretch of k.
constexpr int64_t kBlockTiles = 4;
// Bytes of one panel, all tiles together: half of a 256 KB L2, the smallest in use.
constexpr int64_t kPanelBytes = 128 * 1024;
// Pieces of work per thread: so many that a thread that is late leaves its share to the others.
constexpr int64_t kPiecesPerThread = 8;

// How far ahead of the codes in use to ask for more: the hardware's prefetcher stops at the end of a
// 4 KB page, and this starts on the next one in time.  12 to 25 % of decode (1 and 2 KB gave less).
constexpr int64_t kPrefetch = 3072;

inline void prefetch(const uint8_t* codes, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kBlock) __builtin_prefetch(codes + kPrefetch + i);
}

struct Buffer {
  void* p = nullptr;
  explicit Buffer(int64_t bytes) {
    if (posix_memalign(&p, 64, static_cast<size_t>(bytes > 0 ? bytes : 1))) p = nullptr;
  }
  ~Buffer() { free(p); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
};

struct Scales {
  const void* p;
  bool f16;
  F load(int64_t i) const {
    return f16 ? f_load_f16(static_cast<const uint16_t*>(p) + i)
               : f_load(static_cast<const float*>(p) + i);
  }
};

inline uint16_t bf16_of_float(float x) {  // to nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Writes 16 sums, plus bias and residual, to y[row, 16 * tile ...], leaving out rows of W beyond n.
inline void store_tile(const memlm_packed& w, const memlm_matmul_args& args, int64_t tile,
                       int64_t row, F sums) {
  const int64_t n0 = tile * kTileRows;
  const int64_t left = w.n - n0, count = left < kTileRows ? left : kTileRows;
  const int64_t size = args.dtype == MEMLM_F32 ? 4 : 2;
  if (args.bias) sums = f_add(sums, load_floats(args.bias, args.dtype, n0, count));
  if (args.residual) {
    const int64_t at = row * args.residual_stride + n0;
    sums = f_add(sums, load_floats(args.residual, args.dtype, at, count));
  }
  alignas(64) float f32[kTileRows];
  alignas(64) uint16_t half[kTileRows];
  f_store(f32, sums);
  if (args.dtype == MEMLM_F16) f_store_f16(half, sums);
  if (args.dtype == MEMLM_BF16)
    for (int i = 0; i < kTileRows; ++i) half[i] = bf16_of_float(f32[i]);
  memcpy(static_cast<char*>(args.y) + (row * args.y_stride + n0) * size,
         args.dtype == MEMLM_F32 ? static_cast<const void*>(f32) : half, count * size);
}

// Packed x for the accurate mode, per register tile of MT rows: f32 [K][MT].
// For the fast mode, per register tile and 32 k, so that the loop reads one stream:
//     int8 codes [8][MT][4] | f32 scale [MT] | [MT] of what the sum of the codes is needed for:
//     with offsets f32 scale * sum, else int32 -kDotBias * sum, where the integer sums start
constexpr int64_t kFastRecord = kActGroup + 4 + 4;  // bytes per row of x and 32 k
static inline int64_t packed_row_bytes(bool fast, int64_t padded) {
  return fast ? padded / kActGroup * kFastRecord : padded * 4;
}

inline void pack_accurate(const float* x, int64_t padded, int mt, int row, void* packed) {
  float* out = static_cast<float*>(packed) + row;
  for (int64_t i = 0; i < padded; ++i) out[i * mt] = x[i];
}

// memlm/ops/_matmul.py, quantize_activations, specifies the rounding.
template <class W>
inline void pack_fast(const float* x, int64_t padded, int mt, int row, void* packed) {
  char* record = static_cast<char*>(packed);
  for (int64_t i = 0; i < padded; i += kActGroup, record += kFastRecord * mt) {
    const F a = f_load(x + i), b = f_load(x + i + 16);
    const int32_t bits = i_reduce_max(i_max(f_magnitude_bits(a), f_magnitude_bits(b)));
    float amax;
    memcpy(&amax, &bits, 4);
    float inverse = 127 / amax, scale = amax / 127;
    if (bits >= 0x7f800000) {  // Inf or NaN
      inverse = 0;
      scale = NAN;
    } else if (inverse > 3.402823466e38f) {
      inverse = scale = 0;
    }
    I qa = i_zero(), qb = i_zero();
    if (inverse != 0) {
      qa = f_round(f_mul(a, f_set1(inverse)));
      qb = f_round(f_mul(b, f_set1(inverse)));
    }
    const int32_t sum = i_reduce_add(i_add(qa, qb));
    int8_t q[kActGroup];
    i_store_i8(q, qa);
    i_store_i8(q + 16, qb);
    for (int j = 0; j < kActGroup / kLaneK; ++j)
      memcpy(record + (j * mt + row) * kLaneK, q + j * kLaneK, kLaneK);
    memcpy(record + kActGroup * mt + 4 * row, &scale, 4);
    const float offset_factor = scale * static_cast<float>(sum);
    const int32_t start = -W::kDotBias * sum;
    memcpy(record + (kActGroup + 4) * mt + 4 * row,
           W::kOffsets ? static_cast<const void*>(&offset_factor) : &start, 4);
  }
}

// A weight type (w4_matmul-inl.h, w8_matmul-inl.h) gives:
//   kBits; kOffsets: has offsets; kZero: what to subtract from a code, where there are none;
//   kDotBias: the same for what load2 gives, in integer sums
//   kUnpacks: prefill unpacks codes into bytes (else it reads them where they are)
//   Sums: the integer sums of 16 rows; start(x), dot(sums, block, x), total(sums, x): x is added
//   load2(p, i, b0, b1): blocks 2i and 2i+1 of the 32 k at p
//   kLoadK, LoadIndices: the k in 64 bytes of codes; weight<j>(block): the code at k + j, as float

// The codes of one tile from k0 on, packed.
template <class W>
struct Stretch {
  const uint8_t* codes;
  Scales scales, offsets;
  int64_t scale_index;  // of the first group
  int64_t groups;       // scales in the stretch
  int64_t subs;         // runs of 32 k per scale

  Stretch(const memlm_packed& w, int64_t tile, int64_t k0, int64_t k1) {
    const int64_t padded = padded_k(w.k, w.group);
    const int64_t group = w.group ? w.group : padded;
    codes = static_cast<const uint8_t*>(w.codes) + tile * tile_bytes(W::kBits, padded) +
            tile_bytes(W::kBits, k0);
    scales = {w.scales, w.scale_dtype == MEMLM_F16};
    offsets = {w.offsets, w.scale_dtype == MEMLM_F16};
    scale_index = (tile * (padded / group) + k0 / group) * kTileRows;
    groups = w.group ? (k1 - k0) / group : 1;
    subs = (k1 - k0) / groups / kActGroup;
  }
  F scale(int64_t g) const { return scales.load(scale_index + g * kTileRows); }
  F offset(int64_t g) const {
    return W::kOffsets ? offsets.load(scale_index + g * kTileRows)
                       : f_mul(scale(g), f_set1(-W::kZero));
  }
};

// ---- accurate: f32 arithmetic ------------------------------------------------------------------

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
  void add(int k, F w, const float* x) {
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

template <int... J>
struct Indices {};

// Calls use(j, weights at k + j) for the k of one load of packed codes.
template <class W, class Use, int... J>
inline void each_weight(const uint8_t* codes, F scale, F offset, Use&& use,
                        Indices<J...>) {
  const B b = b_load(codes);
  // With offset = -kZero * scale the FMA is exact wherever the product is; see numerics in tests.
  (use(J, f_fma(W::template weight<J>(b), scale, offset)), ...);
}

template <class W, int MT>
inline void accurate_direct(const Stretch<W>& s, const void* x, float* sums) {
  FloatSums<MT> acc(sums);
  const float* xp = static_cast<const float*>(x);
  const uint8_t* codes = s.codes;
  for (int64_t g = 0; g < s.groups; ++g) {
    const F scale = s.scale(g), offset = s.offset(g);
    for (int64_t i = 0; i < s.subs * kActGroup / W::kLoadK; ++i) {
      prefetch(codes, kBlock);
      each_weight<W>(codes, scale, offset, [&](int j, F w) { acc.add(j, w, xp + j * MT); },
                     typename W::LoadIndices());
      codes += kBlock;
      xp += W::kLoadK * MT;
    }
  }
  acc.store(sums);
}

// Panel of the accurate mode: f32 [k][16].
template <class W>
inline void accurate_unpack(const Stretch<W>& s, void* panel) {
  float* out = static_cast<float*>(panel);
  const uint8_t* codes = s.codes;
  for (int64_t g = 0; g < s.groups; ++g) {
    const F scale = s.scale(g), offset = s.offset(g);
    for (int64_t i = 0; i < s.subs * kActGroup / W::kLoadK; ++i) {
      each_weight<W>(codes, scale, offset, [&](int j, F w) { f_store(out + j * kTileRows, w); },
                     typename W::LoadIndices());
      codes += kBlock;
      out += W::kLoadK * kTileRows;
    }
  }
}

template <int MT>
inline void accurate_panel(const void* panel, int64_t k, const void* x, float* sums) {
  FloatSums<MT> acc(sums);
  const float* w = static_cast<const float*>(panel);
  const float* xp = static_cast<const float*>(x);
  for (int64_t i = 0; i < k; i += 4)
    for (int j = 0; j < 4; ++j, w += kTileRows, xp += MT) acc.add(j, f_load(w), xp);
  acc.store(sums);
}

// ---- fast: integer products, one f32 FMA per 32 k ----------------------------------------------

template <class W, int MT>
struct IntegerSums {
  F v[MT];
  explicit IntegerSums(const float* sums) {
    for (int m = 0; m < MT; ++m) v[m] = f_load(sums + m * kTileRows);
  }
  // Adds 32 k: load2(i, b0, b1) gives blocks 2i and 2i + 1, x is one record.
  template <class Load>
  void add(const Load& load2, F scale, F offset, const char* x) {
    const char* x_scales = x + kActGroup * MT;
    const auto start = [&](int m) {
      int32_t value = 0;
      if (W::kDotBias) memcpy(&value, x_scales + 4 * (MT + m), 4);
      return value;
    };
    typename W::Sums p[MT];
    for (int m = 0; m < MT; ++m) p[m] = W::start(start(m));
    const int8_t* q = reinterpret_cast<const int8_t*>(x);
#pragma GCC unroll 1
    for (int i = 0; i < 4; ++i, q += 2 * MT * kLaneK) {
      B b0, b1;
      load2(i, b0, b1);
      for (int m = 0; m < MT; ++m) p[m] = W::dot(p[m], b0, q + m * kLaneK);
      for (int m = 0; m < MT; ++m) p[m] = W::dot(p[m], b1, q + (MT + m) * kLaneK);
    }
    for (int m = 0; m < MT; ++m) {
      float x_scale, offset_factor;
      memcpy(&x_scale, x_scales + 4 * m, 4);
      memcpy(&offset_factor, x_scales + 4 * (MT + m), 4);
      const F dot = f_from_i(W::total(p[m], start(m)));
      v[m] = f_fma(f_mul(dot, f_set1(x_scale)), scale, v[m]);
      if (W::kOffsets) v[m] = f_fma(f_set1(offset_factor), offset, v[m]);
    }
  }
  void store(float* sums) const {
    for (int m = 0; m < MT; ++m) f_store(sums + m * kTileRows, v[m]);
  }
};

template <class W, int MT>
inline void fast_direct(const Stretch<W>& s, const void* x, float* sums) {
  IntegerSums<W, MT> acc(sums);
  const char* xp = static_cast<const char*>(x);
  const uint8_t* codes = s.codes;
  for (int64_t g = 0; g < s.groups; ++g) {
    const F scale = s.scale(g), offset = W::kOffsets ? s.offset(g) : f_zero();
    for (int64_t i = 0; i < s.subs; ++i) {
      prefetch(codes, tile_bytes(W::kBits, kActGroup));
      acc.add([&](int j, B& b0, B& b1) { W::load2(codes, j, b0, b1); }, scale, offset, xp);
      codes += tile_bytes(W::kBits, kActGroup);
      xp += kFastRecord * MT;
    }
  }
  acc.store(sums);
}

// Panel of the fast mode, per 32 k: f32 scale [16], f32 offset [16] (if any), 8 blocks of codes as
// bytes.
template <class W>
constexpr int64_t kFastPanelRecord = 64 * (W::kOffsets ? 2 : 1) + 8 * kBlock;

template <class W>
inline void fast_unpack(const Stretch<W>& s, void* panel) {
  char* out = static_cast<char*>(panel);
  const uint8_t* codes = s.codes;
  for (int64_t g = 0; g < s.groups; ++g) {
    const F scale = s.scale(g), offset = W::kOffsets ? s.offset(g) : f_zero();
    for (int64_t i = 0; i < s.subs; ++i) {
      f_store(reinterpret_cast<float*>(out), scale);
      if (W::kOffsets) f_store(reinterpret_cast<float*>(out) + 16, offset);
      char* blocks = out + 64 * (W::kOffsets ? 2 : 1);
      for (int j = 0; j < 4; ++j) {
        B b0, b1;
        W::load2(codes, j, b0, b1);
        b_store(blocks + 2 * j * kBlock, b0);
        b_store(blocks + (2 * j + 1) * kBlock, b1);
      }
      codes += tile_bytes(W::kBits, kActGroup);
      out += kFastPanelRecord<W>;
    }
  }
}

template <class W, int MT>
inline void fast_panel(const void* panel, int64_t k, const void* x, float* sums) {
  IntegerSums<W, MT> acc(sums);
  const char* p = static_cast<const char*>(panel);
  const char* xp = static_cast<const char*>(x);
  for (int64_t i = 0; i < k; i += kActGroup, p += kFastPanelRecord<W>, xp += kFastRecord * MT) {
    const float* scales = reinterpret_cast<const float*>(p);
    const char* blocks = p + 64 * (W::kOffsets ? 2 : 1);
    acc.add(
        [&](int j, B& b0, B& b1) {
          b0 = b_load(blocks + 2 * j * kBlock);
          b1 = b_load(blocks + (2 * j + 1) * kBlock);
        },
        f_load(scales), W::kOffsets ? f_load(scales + 16) : f_zero(), xp);
  }
  acc.store(sums);
}

// ---- the two ways, for either mode -------------------------------------------------------------

template <class W>
struct Fast {
  static constexpr bool kFast = true, kUnpacks = W::kUnpacks;
  static constexpr int kDirectTiles = kDirectTilesFast;
  static constexpr int64_t kPanelBytesPerK = kFastPanelRecord<W> / kActGroup;
  static constexpr auto pack = pack_fast<W>;
  static void unpack(const Stretch<W>& s, void* panel) { fast_unpack<W>(s, panel); }
  template <int MT>
  static void direct(const Stretch<W>& s, const void* x, float* sums) {
    fast_direct<W, MT>(s, x, sums);
  }
  template <int MT>
  static void panel(const void* panel, int64_t k, const void* x, float* sums) {
    fast_panel<W, MT>(panel, k, x, sums);
  }
};

template <class W>
struct Accurate {
  static constexpr bool kFast = false, kUnpacks = true;
  static constexpr int kDirectTiles = kDirectTilesAccurate;
  static constexpr int64_t kPanelBytesPerK = 4 * kTileRows;
  static constexpr auto pack = pack_accurate;
  static void unpack(const Stretch<W>& s, void* panel) { accurate_unpack<W>(s, panel); }
  template <int MT>
  static void direct(const Stretch<W>& s, const void* x, float* sums) {
    accurate_direct<W, MT>(s, x, sums);
  }
  template <int MT>
  static void panel(const void* panel, int64_t k, const void* x, float* sums) {
    accurate_panel<MT>(panel, k, x, sums);
  }
};

template <int N>
struct Rows { static constexpr int value = N; };

// Calls f(Rows<rows>()) for rows in 1..kTileM.
template <int N = kTileM, class F_>
inline void with_rows(int rows, const F_& f) {
  if constexpr (N > 1) {
    if (rows < N) return with_rows<N - 1>(rows, f);
  }
  f(Rows<N>());
}

template <class Mode, class W>
memlm_status matmul(const memlm_packed& w, const memlm_matmul_args& args) {
  const int64_t padded = padded_k(w.k, w.group), tiles = div_up(w.n, kTileRows);
  const int64_t row_bytes = packed_row_bytes(Mode::kFast, padded);
  // Register tiles of x, as even as they can be: a tile of few rows costs nearly as much as a full one.
  const int64_t x_tiles = div_up(args.m, kTileM), tile_rows = div_up(args.m, x_tiles);
  const auto rows_of = [&](int64_t x_tile) {
    const int64_t left = args.m - x_tile * tile_rows;
    return static_cast<int>(left < tile_rows ? left : tile_rows);
  };

  // Prefill: the stretch of k is what the panel's bytes allow, in whole groups.
  const bool prefill = args.m > kTileM;
  int64_t block = tiles / (args.threads * kPiecesPerThread);
  block = block < 1 ? 1 : block > kBlockTiles ? kBlockTiles : block;
  constexpr int64_t kStretch =
      kPanelBytes / kBlockTiles / Mode::kPanelBytesPerK / 128 * 128;
  static_assert(kStretch >= 128, "a stretch holds the largest group");
  const int64_t stretch = kStretch < padded ? kStretch : padded;
  const bool unpack = Mode::kUnpacks && x_tiles > Mode::kDirectTiles;
  const int64_t panel_bytes = unpack ? stretch * Mode::kPanelBytesPerK : 0;
  const int64_t sums_bytes = prefill ? args.m * kTileRows * 4 : 0;
  const int64_t slot_bytes = block * (panel_bytes + sums_bytes);

  const Buffer x_packed(args.m * row_bytes);
  const Buffer rows(args.threads * padded * 4);
  const Buffer slots(args.threads * slot_bytes);
  if (!x_packed.p || !rows.p || !slots.p) return MEMLM_NO_MEMORY;
  char* xp = static_cast<char*>(x_packed.p);

  parallel_for(x_tiles, div_up(x_tiles, args.threads * kPiecesPerThread), args.threads,
               [&](int64_t begin, int64_t end, int slot) {
                 for (int64_t t = begin; t < end; ++t) {
                   for (int i = 0; i < rows_of(t); ++i) {
                     float* buffer = static_cast<float*>(rows.p) + slot * padded;
                     const float* row = input_row(args, t * tile_rows + i, w.k, padded, buffer);
                     Mode::pack(row, padded, rows_of(t), i, xp + t * tile_rows * row_bytes);
                   }
                 }
               });

  if (!prefill) {
    const int mt = rows_of(0);
    parallel_for(tiles, div_up(tiles, args.threads * kPiecesPerThread), args.threads,
                 [&](int64_t begin, int64_t end, int) {
                   for (int64_t tile = begin; tile < end; ++tile) {
                     alignas(64) float sums[kTileM * kTileRows] = {};
                     const Stretch<W> s(w, tile, 0, padded);
                     with_rows(mt, [&](auto n) { Mode::template direct<n.value>(s, xp, sums); });
                     for (int i = 0; i < mt; ++i)
                       store_tile(w, args, tile, i, f_load(sums + i * kTileRows));
                   }
                 });
    return MEMLM_OK;
  }

  parallel_for(div_up(tiles, block), 1, args.threads, [&](int64_t begin, int64_t end, int slot) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t tile0 = b * block;
      const int64_t count = tiles - tile0 < block ? tiles - tile0 : block;
      char* panels = static_cast<char*>(slots.p) + slot * slot_bytes;
      float* sums = reinterpret_cast<float*>(panels + block * panel_bytes);
      memset(sums, 0, count * sums_bytes);
      for (int64_t k0 = 0; k0 < padded; k0 += stretch) {
        const int64_t k1 = k0 + stretch < padded ? k0 + stretch : padded;
        if (unpack)
          for (int64_t i = 0; i < count; ++i)
            Mode::unpack(Stretch<W>(w, tile0 + i, k0, k1), panels + i * panel_bytes);
        for (int64_t t = 0; t < x_tiles; ++t) {
          const int mt = rows_of(t);
          const char* x = xp + t * tile_rows * row_bytes + packed_row_bytes(Mode::kFast, k0) * mt;
          for (int64_t i = 0; i < count; ++i) {
            float* out = sums + (i * args.m + t * tile_rows) * kTileRows;
            with_rows(mt, [&](auto n) {
              if (unpack)
                Mode::template panel<n.value>(panels + i * panel_bytes, k1 - k0, x, out);
              else
                Mode::template direct<n.value>(Stretch<W>(w, tile0 + i, k0, k1), x, out);
            });
          }
        }
      }
      for (int64_t i = 0; i < count; ++i)
        for (int64_t row = 0; row < args.m; ++row)
          store_tile(w, args, tile0 + i, row, f_load(sums + (i * args.m + row) * kTileRows));
    }
  });
  return MEMLM_OK;
}

template <class W>
memlm_status matmul(const memlm_packed& w, const memlm_matmul_args& args) {
  return args.fast ? matmul<Fast<W>, W>(w, args) : matmul<Accurate<W>, W>(w, args);
}

}  // namespace MEMLM_ISA
}  // namespace memlm
