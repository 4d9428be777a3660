// The skeleton of y = x W^T + bias, and of what stands around it, over packed weights; shared by all
// matmuls.
//
// A mode of arithmetic (accurate-inl.h, fast-inl.h, per_row-inl.h, tiles-inl.h) multiplies a register
// tile: some rows of x by one tile (16 rows) of W, along k.  Who reads W:
//   few rows, m <= kTileM: the register tile reads the packed form directly; every byte of W is read
//     once.
//   many rows: a thread takes a block of tiles of W and a stretch of k, and runs all of x over them;
//     where x has more than kDirectTiles register tiles it unpacks them first, once, into a panel
//     (in its L2).
//
//            k ->                       One thread's work with many rows: a block of tiles, for each
//        +----+----+----+               stretch of k: unpack the panel, then for each register tile of
//   W    |::::|    |    | <- block      x (packed once for all threads) multiply by the tiles of W.
//        |::::|    |    |    of tiles   The sums stay in the thread's workspace between stretches.
//        +----+----+----+
//          ^ panel
//
// The order of additions never depends on the threads.  It does, in the last bits, on m: through the
// stretches, in accurate mode through the chains of a register tile, and where many rows run on a
// tile unit.
#pragma once
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../formats.h"
#include "../include/memlm.h"
#include "accurate-inl.h"
#include "fast-inl.h"
#include "input-inl.h"
#include "per_row-inl.h"
#include "silu-inl.h"
#include "threads.h"
#include "weights-inl.h"
#ifdef MEMLM_TILE_UNIT
#include "tiles-inl.h"
#endif

namespace memlm {
namespace MEMLM_ISA {

struct Buffer {
  void* p = nullptr;
  explicit Buffer(int64_t bytes) {
    if (posix_memalign(&p, 64, static_cast<size_t>(bytes > 0 ? bytes : 1))) p = nullptr;
  }
  ~Buffer() { free(p); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
};

// How x is cut into register tiles of rows.
struct RowTiles {
  int64_t m, count, rows;
  // As even as they can be: a register tile of few rows costs nearly as much as a full one.
  static RowTiles even(int64_t m, int64_t most) {
    const int64_t count = div_up(m, most);
    return {m, count, div_up(m, count)};
  }
  static RowTiles full(int64_t m, int64_t most) { return {m, div_up(m, most), most}; }
  int rows_of(int64_t tile) const {
    const int64_t left = m - tile * rows;
    return static_cast<int>(left < rows ? left : rows);
  }
};

// y has one tile of columns for each tile of W, or, with swiglu, for each two: a gate and, half of W
// further on, what it lets through.
struct Columns {
  int64_t n, tiles;
  int parts;
  Columns(const memlm_packed& w, const memlm_matmul_args& args)
      : n(args.swiglu ? w.n / 2 : w.n), tiles(div_up(n, kTileRows)), parts(args.swiglu ? 2 : 1) {}
  int64_t w_tile(int64_t tile, int part) const { return tile + part * tiles; }
};

// Writes the 16 sums of a tile of y (and its gate's before them), with what comes after the product,
// to y[row, 16 * tile ...], leaving out columns beyond n.
__attribute__((always_inline)) inline void store_tile(const Columns& columns, const memlm_matmul_args& args,
                                                      int64_t tile, int64_t row, const F* sums) {
  const int64_t n0 = tile * kTileRows;
  const int64_t left = columns.n - n0, count = left < kTileRows ? left : kTileRows;
  const int64_t size = args.dtype == MEMLM_F32 ? 4 : 2;
  const auto biased = [&](int part) {
    if (!args.bias) return sums[part];
    return f_add(sums[part], load_floats(args.bias, args.dtype, part * columns.n + n0, count));
  };
  F y = biased(0);
  if (args.swiglu) y = f_mul(silu(y), biased(1));
  if (args.residual)
    y = f_add(y, load_floats(args.residual, args.dtype, row * args.residual_stride + n0, count));
  char* out = static_cast<char*>(args.y) + (row * args.y_stride + n0) * size;
  if (args.dtype == MEMLM_F32 && count == kTileRows) {
    f_store(reinterpret_cast<float*>(out), y);
    return;
  }
  alignas(64) float f32[kTileRows];
  alignas(64) uint16_t half[kTileRows];
  f_store(f32, y);
  if (args.dtype == MEMLM_F16) f_store_f16(half, y);
  if (args.dtype == MEMLM_BF16)
    for (int i = 0; i < kTileRows; ++i) half[i] = bf16_of_float(f32[i]);
  memcpy(out, args.dtype == MEMLM_F32 ? static_cast<const void*>(f32) : half, count * size);
}

// Asks for the places of y that store_tile will write soon: 512 x 4096 of them took a millisecond less of
// 17 on Zen 5.
inline void prefetch_tiles(const Columns& columns, const memlm_matmul_args& args, int64_t tile,
                           int64_t tiles, int64_t row, int rows) {
  const int64_t size = args.dtype == MEMLM_F32 ? 4 : 2, n0 = tile * kTileRows;
  const int64_t n1 = n0 + tiles * kTileRows < columns.n ? n0 + tiles * kTileRows : columns.n;
  for (int i = 0; i < rows; ++i) {
    const char* y = static_cast<const char*>(args.y) + (row + i) * args.y_stride * size;
    for (int64_t at = n0 * size; at < n1 * size; at += 64) __builtin_prefetch(y + at, 1);
  }
}

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

// Pieces of work per thread: so many that a thread that is late leaves its share to the others.
constexpr int64_t kPiecesPerThread = 8;

// Packs all of x: register tile t lies at t * tiles.rows rows.
template <class Mode>
void pack_rows(const memlm_packed& w, const Input& in, const RowTiles& tiles, int64_t padded,
               float* buffers, char* packed) {
  const int64_t row_bytes = Mode::row_bytes(padded);
  parallel_for(tiles.count, div_up(tiles.count, in.args.threads * kPiecesPerThread), in.args.threads,
               [&](int64_t begin, int64_t end, int slot) {
    for (int64_t t = begin; t < end; ++t) {
      const int mt = tiles.rows_of(t);
      char* x_tile = packed + t * tiles.rows * row_bytes;
      if (Mode::kTiles && mt < tiles.rows) memset(x_tile, 0, tiles.rows * row_bytes);
      for (int i = 0; i < mt; ++i)
        Mode::pack(in, t * tiles.rows + i, w.k, padded, mt, i, buffers + slot * padded, x_tile);
    }
  });
}

// How many k few rows take of compressed weights at a time, a multiple of the largest group: the panel
// takes half of a 32 KB L1.
template <class Mode>
constexpr int64_t kExpandK = 16 * 1024 / Mode::kPanelBytesPerK / 128 * 128;

// Few rows of x times one tile of compressed weights.
template <class Mode, class W>
void expand_and_multiply(const W& codec, const memlm_packed& w, int64_t tile, int64_t padded, int mt,
                         const char* x, float* sums) {
  if constexpr (Mode::kExpandsDirectly) {
    if (mt == 1) return Mode::template direct<1>(Stretch<W>(codec, w, tile, 0, padded), x, sums);
  }
  constexpr int64_t kStep = kExpandK<Mode>;
  alignas(64) char panel[kStep * Mode::kPanelBytesPerK];
  const uint8_t* codes = nullptr;
  for (int64_t k = 0; k < padded; k += kStep) {
    const int64_t end = k + kStep < padded ? k + kStep : padded;
    const Stretch<W> s(codec, w, tile, k, end, codes);
    codes = Mode::unpack(s, panel);
    with_rows(mt, [&](auto n) { Mode::template panel<n.value>(s.runs, panel, x, sums); });
  }
}

// Row `row` of a product from its sums, which are floats unless the mode's are integers.
template <class Mode, class W>
inline F finished(const Stretch<W>& s, const char* x_tile, int64_t padded, int mt, int row,
                  const float* sums) {
  if constexpr (Mode::kIntegers) return Mode::finish(s, x_tile, padded, mt, row, sums);
  return f_load(sums);
}

template <class Mode, class W>
void few_rows(const W& codec, const memlm_packed& w, const memlm_matmul_args& args, int64_t padded,
              const char* x) {
  const Columns columns(w, args);
  const int mt = static_cast<int>(args.m);
  parallel_for(columns.tiles, div_up(columns.tiles, args.threads * kPiecesPerThread), args.threads,
               [&](int64_t begin, int64_t end, int) {
    for (int64_t tile = begin; tile < end; ++tile) {
      alignas(64) float sums[kTileM * kTileRows];
      F totals[kTileM][2];
      for (int part = 0; part < columns.parts; ++part) {
        const int64_t w_tile = columns.w_tile(tile, part);
        const Stretch<W> s(codec, w, w_tile, 0, padded);
        Mode::start(x, padded, mt, sums);
        if constexpr (!W::kCompressed) {
          with_rows(mt, [&](auto n) { Mode::template direct<n.value>(s, x, sums); });
        } else {
          expand_and_multiply<Mode>(codec, w, w_tile, padded, mt, x, sums);
        }
        for (int row = 0; row < mt; ++row)
          totals[row][part] = finished<Mode>(s, x, padded, mt, row, sums + row * kTileRows);
      }
      for (int row = 0; row < mt; ++row) store_tile(columns, args, tile, row, totals[row]);
    }
  });
}

constexpr int64_t kMostBlockTiles = 32;

// Some tiles of W in a stretch of their stored k: one for each of `tiles` tiles of y, then the second
// part of each.
template <class W>
struct Block {
  const W& codec;
  const memlm_packed& w;
  const Columns& columns;
  int64_t tile0, tiles, k0, k1;
  char* panels;
  int64_t panel_bytes;
  const uint8_t* at[kMostBlockTiles];  // of compressed codes: where the stretch before ended

  int64_t w_tile(int64_t i) const { return columns.w_tile(tile0 + i % tiles, i >= tiles); }
  Stretch<W> stretch(int64_t i) const { return {codec, w, w_tile(i), k0, k1, k0 ? at[i] : nullptr}; }
  char* panel(int64_t i) const { return panels + i * panel_bytes; }
};

// Tiles of W per block.  x is streamed from the L3 once per block: 4 tiles are 64 multiply-adds for a
// byte of x, 32 tiles, whose unit multiplies ten times as fast, 512.  More would not fit the L2
// together with the panel's stretch of k.
template <class Mode>
constexpr int64_t kBlockTiles = Mode::kTiles ? kMostBlockTiles : 4;
// Bytes of one panel, all tiles together: half of a 256 KB L2, the smallest in use; every CPU with a
// tile unit has 2 MB.
template <class Mode>
constexpr int64_t kPanelBytes = Mode::kTiles ? 512 * 1024 : 128 * 1024;
// On a tile unit a stretch of x's register tile stays in a 48 KB L1 while the tiles of W pass by.
constexpr int64_t kTileXBytes = 32 * 1024;
// Rows of x whose sums are kept at a time: 32 KB for a tile of W, 1 MB of a 2 MB L2 for 32.
constexpr int64_t kChunkRows = 512;

template <class Mode>
constexpr int64_t longest_stretch() {
  const int64_t fits = kPanelBytes<Mode> / kBlockTiles<Mode> / Mode::kPanelBytesPerK / 128 * 128;
  static_assert(fits >= 128, "a stretch holds the largest group");
  if constexpr (Mode::kTiles) {
    const int64_t x_fits = kTileXBytes / Mode::bytes_before(128, 0) / 2 * 128;
    return x_fits < fits ? x_fits : fits;
  }
  return fits;
}

// The most k that a tile stores.
inline int64_t longest_tile(const memlm_packed& w, int64_t padded) {
  if (w.pattern != MEMLM_BLOCKS) return padded;
  int64_t longest = 0;
  for (int64_t tile = 0; tile < div_up(w.n, kTileRows); ++tile) {
    const int64_t stored = stored_k(w, tile, padded);
    longest = stored > longest ? stored : longest;
  }
  return longest;
}

template <class Mode, class W>
memlm_status many_rows(const W& codec, const memlm_packed& w, const memlm_matmul_args& args,
                       int64_t padded, const RowTiles& x_tiles, const char* x) {
  const Columns columns(w, args);
  const int64_t row_bytes = Mode::row_bytes(padded);
  int64_t most = columns.tiles / (args.threads * kPiecesPerThread);
  if (Mode::kTiles) most += most % 2;  // they are multiplied in pairs
  const int64_t longest = longest_tile(w, padded);
  constexpr int64_t kStretch = longest_stretch<Mode>();
  // Tiles of W that are short (few k, or sparse) are read in one stretch.  No sums wait for the next one
  // then, and more tiles share a pass of x.
  const bool whole_k = !Mode::kTiles && longest <= kStretch;
  const int64_t stretch = whole_k ? longest : kStretch < padded ? kStretch : padded;
  const int64_t fits = whole_k && longest ? kPanelBytes<Mode> / (longest * Mode::kPanelBytesPerK)
                                          : kBlockTiles<Mode>;
  const int64_t limit = (fits < kMostBlockTiles ? fits : kMostBlockTiles) / columns.parts;
  const int64_t size = most < 1 ? 1 : most > limit ? limit : most;  // tiles of y per block
  bool unpack = Mode::kUnpacks;
  if constexpr (!Mode::kTiles && !W::kCompressed) unpack = unpack && x_tiles.count > Mode::kDirectTiles;
  const int64_t panel_bytes = unpack ? stretch * Mode::kPanelBytesPerK : 0;
  const int64_t chunk = whole_k ? 1 : div_up(kChunkRows, x_tiles.rows);  // register tiles
  const int64_t chunk_rows = (chunk < x_tiles.count ? chunk : x_tiles.count) * x_tiles.rows;
  const int64_t slot_bytes = size * columns.parts * (panel_bytes + chunk_rows * kTileRows * 4);
  const Buffer slots(args.threads * slot_bytes);
  if (!slots.p) return MEMLM_NO_MEMORY;

  const auto work = [&](const Block<W>& whole, int64_t t0, int64_t t1, float* sums) {
    const int64_t count = whole.tiles * columns.parts, sums_next = chunk_rows * kTileRows;
    const auto x_tile = [&](int64_t t) { return x + t * x_tiles.rows * row_bytes; };
    const auto sums_of = [&](int64_t t) { return sums + (t - t0) * x_tiles.rows * kTileRows; };
    for (int64_t t = t0; t < t1; ++t)
      for (int64_t i = 0; i < count; ++i)
        Mode::start(x_tile(t), padded, Mode::kTiles ? static_cast<int>(x_tiles.rows) : x_tiles.rows_of(t),
                    sums_of(t) + i * sums_next);
    Block<W> block = whole;
    for (block.k0 = 0; block.k0 < longest; block.k0 = block.k1) {
      block.k1 = block.k0 + stretch < longest ? block.k0 + stretch : longest;
      const uint8_t* ends[kMostBlockTiles];
      if constexpr (Mode::kUnpacks) {
        for (int64_t i = 0; unpack && (!whole_k || t0 == 0) && i < count; ++i)
          ends[i] = Mode::unpack(block.stretch(i), block.panel(i));
      }
      for (int64_t t = t0; t < t1; ++t) {
        const int mt = x_tiles.rows_of(t);
        if (block.k1 == longest)
          prefetch_tiles(columns, args, whole.tile0, whole.tiles, t * x_tiles.rows, mt);
        if constexpr (Mode::kTiles) {
          const char* at = x_tile(t) + Mode::bytes_before(block.k0, mt);
          Mode::multiply(block, count, at, padded, mt, sums_of(t), sums_next);
        } else {
          for (int64_t i = 0; i < count; ++i)
            with_rows(mt, [&](auto n) {
              float* out = sums_of(t) + i * sums_next;
              const Stretch<W> s = block.stretch(i);
              if constexpr (Mode::kUnpacks) {
                if (unpack) return Mode::template panel<n.value>(s.runs, block.panel(i), x_tile(t), out);
              }
              if constexpr (!W::kCompressed) Mode::template direct<n.value>(s, x_tile(t), out);
            });
        }
      }
      if constexpr (W::kCompressed) memcpy(block.at, ends, sizeof ends);
    }
    for (int64_t t = t0; t < t1; ++t)  // y row by row: each lies in pages of its own
      for (int row = 0; row < x_tiles.rows_of(t); ++row)
        for (int64_t i = 0; i < whole.tiles; ++i) {
          F total[2];
          for (int part = 0; part < columns.parts; ++part)
            total[part] = finished<Mode>(whole.stretch(i + part * whole.tiles), x_tile(t), padded,
                                         x_tiles.rows_of(t), row,
                                         sums_of(t) + (i + part * whole.tiles) * sums_next + row * kTileRows);
          store_tile(columns, args, whole.tile0 + i, t * x_tiles.rows + row, total);
        }
  };

  parallel_for(div_up(columns.tiles, size), 1, args.threads, [&](int64_t begin, int64_t end, int slot) {
    const typename Mode::Unit unit;
    char* panels = static_cast<char*>(slots.p) + slot * slot_bytes;
    for (int64_t b = begin; b < end; ++b) {
      const int64_t tile0 = b * size, left = columns.tiles - tile0;
      const Block<W> whole = {codec, w, columns, tile0, left < size ? left : size,
                              0, padded, panels, panel_bytes, {}};
      float* sums = reinterpret_cast<float*>(panels + size * columns.parts * panel_bytes);
      for (int64_t t0 = 0; t0 < x_tiles.count; t0 += chunk)
        work(whole, t0, t0 + chunk < x_tiles.count ? t0 + chunk : x_tiles.count, sums);
    }
  });
  return MEMLM_OK;
}

template <class Mode, class W>
memlm_status matmul(const W& codec, const memlm_packed& w, const Input& in) {
  const int64_t padded = padded_k(w.k, w.group);
  const RowTiles tiles = Mode::kTiles ? RowTiles::full(in.args.m, 2 * kTileRows)
                                      : RowTiles::even(in.args.m, kTileM);
  const Buffer x(tiles.count * tiles.rows * Mode::row_bytes(padded));
  const Buffer buffers(in.args.threads * padded * 4);
  if (!x.p || !buffers.p) return MEMLM_NO_MEMORY;
  pack_rows<Mode>(w, in, tiles, padded, static_cast<float*>(buffers.p), static_cast<char*>(x.p));
  if constexpr (!Mode::kTiles) {
    if (in.args.m <= kTileM) {
      few_rows<Mode>(codec, w, in.args, padded, static_cast<const char*>(x.p));
      return MEMLM_OK;
    }
  }
  return many_rows<Mode>(codec, w, in.args, padded, tiles, static_cast<const char*>(x.p));
}

// Weights times numbers: which mode.
template <class W>
memlm_status matmul(const W& codec, const memlm_packed& w, const memlm_matmul_args& args) {
  const Input in = {args, nullptr, kActGroup};
#ifdef MEMLM_TILE_UNIT
  // Tiles of W are multiplied in pairs by one x, which blocks at places of their own cannot share.
  if (w.pattern == MEMLM_BLOCKS)
    return args.fast ? matmul<Fast<W>>(codec, w, in) : matmul<Accurate<W>>(codec, w, in);
  if (args.fast && args.m >= kTilesFromFast) return matmul<Bf16Tiles<W, OneBf16>>(codec, w, in);
  if (!args.fast && args.m >= kTilesFromAccurate)
    return matmul<Bf16Tiles<W, ThreeBf16>>(codec, w, in);
#endif
  return args.fast ? matmul<Fast<W>>(codec, w, in) : matmul<Accurate<W>>(codec, w, in);
}

}  // namespace MEMLM_ISA
}  // namespace memlm
