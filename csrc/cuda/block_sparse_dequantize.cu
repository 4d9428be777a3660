// Rows of a W of blocks back to floats, computed in f32 as memlm/sparse_formats.py does, to the last bit; 0
// where no block is stored.
//
// A thread block has a tile, 16 rows, and kColumns times 32 k of it.  It notes which of these are stored;
// then a warp takes 32 k at a time, a lane each, one row after the other.
#include "blocks.h"

namespace memlm::cuda {
namespace {

constexpr int kThreads = 256, kColumns = 64;

struct Rows {
  Blocks blocks;
  const int64_t* starts;
  const int32_t* places;
  int64_t row, count;
  int k, chunks;  // thread blocks side by side along k
};

template <class T>
__global__ void __launch_bounds__(kThreads) block_rows_kernel(const Rows p, T* out) {
  float* const numbers = shared<float>();
  int* const stored = reinterpret_cast<int*>(numbers + 16);  // [kColumns]: 1 + which of the tile's, or 0
  p.blocks.put_numbers(numbers);
  const int64_t tile = p.row / kBlockRows + block_x() / p.chunks, begin = p.starts[tile];
  const int first = block_x() % p.chunks * kColumns, count = static_cast<int>(p.starts[tile + 1] - begin);
  if (thread() < kColumns) stored[thread()] = 0;
  MEMLM_SYNC_THREADS();
  for (int b = thread(); b < count; b += kThreads) {
    const int column = p.places[begin + b] - first;
    if (column >= 0 && column < kColumns) stored[column] = b + 1;
  }
  MEMLM_SYNC_THREADS();
  for (int column = warp(); column < kColumns; column += kThreads / kWarp) {
    const int k = (first + column) * kBlockK + lane(), which = stored[column];
    if (k >= p.k) break;
#pragma unroll 2
    for (int r = 0; r < kBlockRows; r++) {
      const int64_t at = tile * kBlockRows + r - p.row;
      if (at < 0 || at >= p.count) continue;
      out[at * p.k + k] = from_float<T>(which ? p.blocks.weight(numbers, begin + which - 1, r, lane()) : 0);
    }
  }
}

}  // namespace
}  // namespace memlm::cuda

using namespace memlm;
using namespace memlm::cuda;

memlm_status memlm_cuda_block_sparse_dequantize(const memlm_packed* w, int bits, int64_t row, int64_t rows,
                                                memlm_dtype dtype, void* out, memlm_cuda_queue* queue) {
  MEMLM_PASS(check_blocks(w, bits));
  MEMLM_PASS(check_rows_of(w, row, rows, dtype, out));
  Gpu gpu;
  MEMLM_PASS(find_gpu(MEMLM_F16, &gpu));
  if (!rows) return MEMLM_OK;
  const int64_t chunks = ceil_div(w->k, kColumns * kBlockK);
  const int64_t tiles = (row + rows - 1) / kBlockRows - row / kBlockRows + 1;
  MEMLM_CHECK(tiles <= INT32_MAX / chunks,
              "rows: got %lld of %lld numbers, which are too many for one call", static_cast<long long>(rows),
              static_cast<long long>(w->k));
  const Rows p = {blocks_of(w, bits), w->starts,
                  static_cast<const int32_t*>(w->places), row, rows, static_cast<int>(w->k),
                  static_cast<int>(chunks)};
  const auto begin = [&](auto kernel, auto* to) {
    return started(launch(kernel, {tiles * chunks}, kThreads, (16 + kColumns) * 4, queue->stream, p, to));
  };
  switch (dtype) {
    case MEMLM_F32: return begin(&block_rows_kernel<float>, static_cast<float*>(out));
    case MEMLM_F16: return begin(&block_rows_kernel<f16>, static_cast<f16*>(out));
    default: return begin(&block_rows_kernel<bf16>, static_cast<bf16*>(out));
  }
}
