// Rows of a sparse W as floats.
#pragma once
#include "block_sparse_matmul-inl.h"
#include "w4_sparse_matmul-inl.h"

namespace memlm {
namespace MEMLM_ISA {

template <class W>
inline void sparse_rows(const W& codec, const memlm_packed& w, int64_t row, int64_t count,
                        memlm_dtype dtype, void* out) {
  const int64_t padded = padded_k(w.k, w.group), size = dtype == MEMLM_F32 ? 4 : 2;
  if (w.pattern == MEMLM_BLOCKS) memset(out, 0, count * w.k * size);  // where no block is
  for (int64_t tile = row / kTileRows; tile * kTileRows < row + count; ++tile) {
    const int64_t first = tile * kTileRows - row;  // of the tile's rows among those asked for
    each_16_k(Stretch<W>(codec, w, tile, 0, padded), [&](int64_t k, const F* rows) {
      const int64_t left = w.k - k;
      for (int64_t r = 0; left > 0 && r < kTileRows; ++r) {
        const int64_t i = first + r;
        if (i < 0 || i >= count) continue;
        alignas(64) float some[16];
        f_store(some, rows[r]);
        store_floats(out, dtype, i * w.k + k, left < 16 ? left : 16, some);
      }
    });
  }
}

// Rows row .. row + count - 1 of W to out [count, k].
inline void sparse_rows(const memlm_packed& w, int bits, int64_t row, int64_t count, memlm_dtype dtype,
                        void* out) {
  const auto use = [&](const auto& codec) { sparse_rows(codec, w, row, count, dtype, out); };
  w.pattern == MEMLM_BLOCKS ? with_codec(w, bits, use) : with_expanded(w, use);
}

}  // namespace MEMLM_ISA
}  // namespace memlm
