// y = x W^T + bias over blocks of 16 rows x 32 k, and its gradients.
//
// A block is what the dense kernels multiply at a time, so they do it here as well: Stretch says which
// 32 k of x a block belongs to.
#pragma once
#include "w2_matmul-inl.h"
#include "w4_matmul-inl.h"
#include "w8_matmul-inl.h"

namespace memlm {
namespace MEMLM_ISA {

// Weights that are floats: [k][16 rows] in a block.
template <class T>
struct Floats {
  static constexpr int kBits = 8 * sizeof(T), kLoadK = 8, kZero = 0;
  static constexpr bool kOffsets = false, kScaled = false, kCompressed = false;
  using LoadIndices = Indices<0, 1, 2, 3, 4, 5, 6, 7>;

  static F load(const uint8_t* codes, int j) {
    const T* p = reinterpret_cast<const T*>(codes) + j * kTileRows;
    if constexpr (sizeof(T) == 4) return f_load(p);
    else return f_load_bf16(p);
  }
};

inline memlm_status block_sparse_matmul(const memlm_packed& w, int bits, const memlm_matmul_args& args) {
  const Input in = {args, nullptr, kActGroup};
  if (bits == 32) return matmul<Accurate<Floats<float>>>(Floats<float>(), w, in);
  if (bits == 16) return matmul<Accurate<Floats<uint16_t>>>(Floats<uint16_t>(), w, in);
  return bits == 2 ? w2_matmul(w, args) : bits == 4 ? w4_matmul(w, args) : w8_matmul(w, args);
}

// Calls use(codec) with what reads W's codes.
template <class Use>
inline void with_codec(const memlm_packed& w, int bits, const Use& use) {
  if (bits == 32) return use(Floats<float>());
  if (bits == 16) return use(Floats<uint16_t>());
  if (bits == 8) return use(W8());
  if (bits == 2) return w.offsets ? use(W2<true>()) : use(W2<false>());
  if (w.levels) return use(W4Table(w.levels));
  w.offsets ? use(W4<true>()) : use(W4<false>());
}

// Calls use(k, rows) for each 16 stored k of a tile in turn: rows[r] are those from k on of row r.
template <class W, class Use>
inline void each_16_k(const Stretch<W>& s, const Use& use) {
  F columns[16];
  each_weight(s, [&](int64_t i, int, F v) {
    columns[i % 16] = v;
    if (i % 16 < 15) return;
    f_transpose(columns);
    use(s.runs[i / kActGroup] * kActGroup + i % kActGroup - 15, columns);
  });
}

// Every block as f32 [16 rows][32 k], block b from out[512 b] on.
template <class W>
void transpose_blocks(const W& codec, const memlm_packed& w, float* out, int threads) {
  const int64_t tiles = div_up(w.n, kTileRows);
  parallel_for(tiles, div_up(tiles, threads * kPiecesPerThread), threads,
               [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t b = w.starts[t]; b < w.starts[t + 1]; ++b) {
        const int64_t at = (b - w.starts[t]) * kActGroup;
        float* block = out + b * kTileRows * kActGroup;
        each_16_k(Stretch<W>(codec, w, t, at, at + kActGroup), [&](int64_t k, const F* rows) {
          for (int r = 0; r < kTileRows; ++r) f_store(block + r * kActGroup + k % kActGroup, rows[r]);
        });
      }
  });
}

// The gradient of x.  A thread takes rows of grad, of which a register tile passes over the blocks of a
// column of W: the sums, 32 k of some rows, stay in registers from block to block.
//
//                 k ->
//          +--+--+--+--+                   each block, transposed once to [16 rows][32 k], is
//   grad   |##|  |  |##|  tile of W        multiplied by 16 columns of grad
//   [m, n] |  |  |##|  |
//          +--+--+--+--+
inline memlm_status block_sparse_grad_x(const memlm_packed& w, int bits, int64_t m, const float* grad,
                                        float* grad_x, int threads) {
  const int64_t tiles = div_up(w.n, kTileRows), runs = div_up(w.k, kActGroup);
  const int64_t blocks = w.starts[tiles];
  const int32_t* places = static_cast<const int32_t*>(w.places);
  // The blocks by column: those of run c are order[from[c]] .. order[from[c + 1] - 1], tiles ascending.
  const Buffer column_starts((runs + 1) * 8), by_column(blocks * 16);
  const Buffer values(blocks * kTileRows * kActGroup * 4);
  if (!column_starts.p || !by_column.p || !values.p) return MEMLM_NO_MEMORY;
  struct Stored { int64_t tile, block; };
  int64_t* from = static_cast<int64_t*>(column_starts.p);
  Stored* order = static_cast<Stored*>(by_column.p);
  memset(from, 0, (runs + 1) * 8);
  for (int64_t b = w.starts[0]; b < blocks; ++b) ++from[places[b] + 1];
  for (int64_t c = 0; c < runs; ++c) from[c + 1] += from[c];
  for (int64_t t = tiles; t-- > 0;)  // from the last one on: from[c + 1] ends where c begins
    for (int64_t b = w.starts[t + 1]; b-- > w.starts[t];) order[--from[places[b] + 1]] = {t, b};
  memmove(from, from + 1, runs * 8);
  from[runs] = blocks - w.starts[0];

  float* const transposed = static_cast<float*>(values.p);
  with_codec(w, bits, [&](const auto& codec) { transpose_blocks(codec, w, transposed, threads); });

  const RowTiles rows = RowTiles::even(m, kTileM);
  const int64_t pieces = rows.count * runs;
  parallel_for(pieces, div_up(pieces, threads * kPiecesPerThread), threads,
               [&](int64_t begin, int64_t end, int) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t c = piece / rows.count, tile = piece % rows.count, row = tile * rows.rows;
      with_rows(rows.rows_of(tile), [&](auto count) {
        constexpr int MT = count.value;
        for (int half = 0; half < kActGroup; half += 16) {
          const int64_t k = c * kActGroup + half;
          if (k >= w.k) break;
          F sums[MT];
          for (F& sum : sums) sum = f_zero();
          for (int64_t i = from[c]; i < from[c + 1]; ++i) {
            const int64_t n0 = order[i].tile * kTileRows, left = w.n - n0;
            const float* v = transposed + order[i].block * kTileRows * kActGroup + half;
            const float* g = grad + row * w.n + n0;
            for (int64_t r = 0; r < (left < kTileRows ? left : kTileRows); ++r) {
              const F weights = f_load(v + r * kActGroup);
              for (int j = 0; j < MT; ++j) sums[j] = f_fma(weights, f_set1(g[j * w.n + r]), sums[j]);
            }
          }
          alignas(64) float some[16];
          for (int j = 0; j < MT; ++j) {
            f_store(some, sums[j]);
            const int64_t left = w.k - k;
            memcpy(grad_x + (row + j) * w.k + k, some, sizeof(float) * (left < 16 ? left : 16));
          }
        }
      });
    }
  });
  return MEMLM_OK;
}

// The gradient of f32 values: for each block the products of 16 columns of grad and 32 of x, summed over
// the rows.  A register tile is 16 rows of W by kTileM k.
inline void block_sparse_grad_values(const memlm_packed& w, int64_t m, const float* grad, const float* x,
                                     float* grad_values, int threads) {
  const int64_t tiles = div_up(w.n, kTileRows);
  parallel_for(tiles, 1, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t n0 = t * kTileRows, rows = w.n - n0 < kTileRows ? w.n - n0 : kTileRows;
      for (int64_t b = w.starts[t]; b < w.starts[t + 1]; ++b) {
        const int64_t k0 = static_cast<const int32_t*>(w.places)[b] * int64_t{kActGroup};
        float* out = grad_values + b * kTileRows * kActGroup;
        for (int64_t k = 0; k < kActGroup; k += kTileM) {
          const int64_t inside = w.k - k0 - k, left = kActGroup - k;
          const int64_t most = left < kTileM ? left : kTileM;
          const int64_t count = inside < 0 ? 0 : inside < most ? inside : most;
          for (int64_t j = count; j < most; ++j) f_store(out + (k + j) * kTileRows, f_zero());
          if (!count) continue;
          with_rows(static_cast<int>(count), [&](auto n) {
            constexpr int K = n.value;
            F sums[K];
            for (F& sum : sums) sum = f_zero();
            const float* g = grad + n0;
            const float* xp = x + k0 + k;
            for (int64_t row = 0; row < m; ++row, g += w.n, xp += w.k) {
              const F lanes = load_floats(g, MEMLM_F32, 0, rows);
              for (int j = 0; j < K; ++j) sums[j] = f_fma(lanes, f_set1(xp[j]), sums[j]);
            }
            for (int j = 0; j < K; ++j) f_store(out + (k + j) * kTileRows, sums[j]);
          });
        }
      }
    }
  });
}

}  // namespace MEMLM_ISA
}  // namespace memlm
