// The gradients of y = x W^T over blocks of 16 rows x 32 k, in f32 throughout: products and sums are those of
// fused multiply-adds, one row of W (or of x) after the other.
//
// grad_x = grad W.  The blocks are stored by rows of W and are needed by columns: a first kernel writes, for
// each column of 32 k and each tile, which block stands there.  Then a thread block takes a column and 64
// rows of grad, and goes through the column's blocks in the order of the tiles, 4 at a time: their weights
// and their 64 columns of grad come to shared memory as f32, a thread computes 4 rows x 4 k.
//
//   map, int32 [columns][tiles]: 1 + the block's number, or 0
//
// grad_values = grad^T x where blocks are stored.  A thread block takes 4 blocks of a tile, and goes through
// the rows of both, 32 at a time; a thread computes 4 rows of W x 4 k.
#include "blocks.h"

namespace memlm::cuda {
namespace {

constexpr int kTile = kBlockRows;
constexpr int kThreads = 128;
constexpr int kSome = 4;              // blocks of W at a time
constexpr int kRows = 64;             // of grad, of a thread block of grad_x
constexpr int kGradStride = kRows + 4;  // between columns of them, so that writes meet 8 banks
constexpr int kChunk = 32;            // rows of grad and x at a time, for grad_values
constexpr int kGradXFloats = kSome * kTile * (kBlockK + kGradStride),
              kGradValuesFloats = kChunk * (kTile + kSome * kBlockK);

__global__ void map_kernel(const int64_t* starts, const int32_t* places, int tiles, int* map) {
  const int tile = block_x();
  for (int64_t b = starts[tile] + thread(); b < starts[tile + 1]; b += threads()) {
    map[static_cast<int64_t>(places[b]) * tiles + tile] = static_cast<int>(b) + 1;
  }
}

__global__ void __launch_bounds__(kThreads, 8)
    grad_x_kernel(const __grid_constant__ Blocks w, const int* map, const float* grad, int64_t m, int n, int k, int tiles,
                  float* grad_x) {
  // [block and row][k], [block and row][row of grad]
  float* const weights = shared<float>();
  float* const grads = weights + kSome * kTile * kBlockK;
  float* const numbers = grads + kSome * kTile * kGradStride;
  int* const chosen = reinterpret_cast<int*>(numbers + 16);  // blocks, and their tiles
  w.put_numbers(numbers);
  const int64_t row0 = static_cast<int64_t>(block_x()) * kRows;
  const int k0 = block_y() * kBlockK, across = thread() % 8 * 4, down = thread() / 8 * 4;
  map += static_cast<int64_t>(block_y()) * tiles;

  float sums[4][4] = {};  // [row of grad][k]
  int tile = 0;           // the next to be looked at
  while (true) {
    // The first warp finds the next blocks of the column.
    MEMLM_SYNC_THREADS();
    if (warp() == 0) {
      int found = 0;
      while (found < kSome && tile < tiles) {
        const int mine = tile + lane() < tiles ? map[tile + lane()] : 0;
        uint32_t stored = ballot(mine != 0);
        const int before = count_bits(stored & ((1u << lane()) - 1));
        if (mine && found + before < kSome) {
          chosen[found + before] = mine - 1;
          chosen[kSome + found + before] = tile + lane();
        }
        // Up to the last that was taken, or all of them.
        for (int left = kSome - found; left > 0 && stored; left--, found++) stored &= stored - 1;
        tile += stored ? count_bits((stored & (0u - stored)) - 1) : kWarp;
      }
      if (lane() == 0) chosen[2 * kSome] = found;
    }
    MEMLM_SYNC_THREADS();
    const int found = chosen[2 * kSome];
    if (!found) break;
    for (int i = thread(); i < found * kTile * kBlockK; i += kThreads) {
      const int j = i % kBlockK, r = i / kBlockK;  // r: block and row
      const bool there = chosen[kSome + r / kTile] * kTile + r % kTile < n;
      weights[i] = there ? w.weight(numbers, chosen[r / kTile], r % kTile, j) : 0;
    }
    for (int i = thread(); i < found * kTile * kRows; i += kThreads) {
      const int r = i % (found * kTile), row = i / (found * kTile);
      const int column = chosen[kSome + r / kTile] * kTile + r % kTile;
      const bool there = column < n && row0 + row < m;
      grads[r * kGradStride + row] = there ? grad[(row0 + row) * n + column] : 0;
    }
    MEMLM_SYNC_THREADS();
    for (int r = 0; r < found * kTile; r++) {
      const Vec4 ws = load<Vec4>(weights + r * kBlockK + across),
                 gs = load<Vec4>(grads + r * kGradStride + down);
      const float wf[4] = {as_float(ws.x), as_float(ws.y), as_float(ws.z), as_float(ws.w)};
      const float gf[4] = {as_float(gs.x), as_float(gs.y), as_float(gs.z), as_float(gs.w)};
#pragma unroll
      for (int i = 0; i < 16; i++) sums[i / 4][i % 4] = fma_f32(gf[i / 4], wf[i % 4], sums[i / 4][i % 4]);
    }
  }
#pragma unroll
  for (int i = 0; i < 16; i++) {
    const int64_t row = row0 + down + i / 4;
    const int column = k0 + across + i % 4;
    if (row < m && column < k) grad_x[row * k + column] = sums[i / 4][i % 4];
  }
}

__global__ void __launch_bounds__(kThreads, 8)
    grad_values_kernel(const int64_t* starts, const int32_t* places, const float* grad, const float* x,
                       int64_t m, int n, int k, float* grad_values) {
  // [row][row of W], [row][block and k]
  float* const grads = shared<float>();
  float* const xs = grads + kChunk * kTile;
  const int tile = block_x(), across = thread() / 4 * 4, down = thread() % 4 * 4;
  const int64_t first = starts[tile] + static_cast<int64_t>(block_y()) * kSome,
                left = starts[tile + 1] - first;
  const int count = left < kSome ? static_cast<int>(left) : kSome;
  if (count <= 0) return;

  float sums[4][4] = {};  // [k][row of W]
  for (int64_t row0 = 0; row0 < m; row0 += kChunk) {
    MEMLM_SYNC_THREADS();
    for (int i = thread(); i < kChunk * kTile; i += kThreads) {
      const int64_t row = row0 + i / kTile;
      const int column = tile * kTile + i % kTile;
      grads[i] = row < m && column < n ? grad[row * n + column] : 0;
    }
    for (int i = thread(); i < kChunk * kSome * kBlockK; i += kThreads) {
      const int64_t row = row0 + i / (kSome * kBlockK);
      const int block = i / kBlockK % kSome;
      const int column = block < count ? places[first + block] * kBlockK + i % kBlockK : k;
      xs[i] = row < m && column < k ? x[row * k + column] : 0;
    }
    MEMLM_SYNC_THREADS();
    for (int row = 0; row < kChunk; row++) {
      const Vec4 gs = load<Vec4>(grads + row * kTile + down),
                 xv = load<Vec4>(xs + row * kSome * kBlockK + across);
      const float gf[4] = {as_float(gs.x), as_float(gs.y), as_float(gs.z), as_float(gs.w)};
      const float xf[4] = {as_float(xv.x), as_float(xv.y), as_float(xv.z), as_float(xv.w)};
#pragma unroll
      for (int i = 0; i < 16; i++) sums[i / 4][i % 4] = fma_f32(xf[i / 4], gf[i % 4], sums[i / 4][i % 4]);
    }
  }
  if (across / kBlockK >= count) return;
#pragma unroll
  for (int i = 0; i < 4; i++) {  // a block is [k][row of W]
    float* const to = grad_values + ((first * kBlockK + across + i) * kTile + down);
    store(to, Vec4{as_bits(sums[i][0]), as_bits(sums[i][1]), as_bits(sums[i][2]), as_bits(sums[i][3])});
  }
}

memlm_status check_rows(int64_t m, bool null) {
  MEMLM_CHECK(m >= 0 && m <= INT32_MAX, "m: got %lld, accepted are 0 to 2^31 - 1", static_cast<long long>(m));
  MEMLM_CHECK(!null, "grad, x or the result: NULL");
  return MEMLM_OK;
}

}  // namespace
}  // namespace memlm::cuda

using namespace memlm;
using namespace memlm::cuda;

memlm_status memlm_cuda_block_sparse_grad_x(const memlm_packed* w, int bits, int64_t m, const float* grad,
                                            float* grad_x, memlm_cuda_queue* queue) {
  MEMLM_PASS(check_blocks(w, bits));
  MEMLM_PASS(check_rows(m, m > 0 && (!grad || !grad_x)));
  Gpu gpu;
  MEMLM_PASS(find_gpu(MEMLM_F16, &gpu));
  const int64_t tiles = ceil_div(w->n, kTile), columns = ceil_div(w->k, kBlockK);
  MEMLM_CHECK(columns <= 65535, "k: got %lld, at most %d are accepted", static_cast<long long>(w->k),
              65535 * kBlockK);
  if (!m) return MEMLM_OK;
  const int64_t bytes = round_up(columns * tiles * 4, 256);
  MEMLM_PASS(need(queue, bytes));
  int* const map = static_cast<int*>(queue->workspace);
  MEMLM_PASS(started(clear(map, bytes, queue->stream)));
  MEMLM_PASS(started(launch(&map_kernel, {tiles}, kThreads, 0, queue->stream, w->starts,
                            static_cast<const int32_t*>(w->places), tiles, map)));
  return started(launch(&grad_x_kernel, {ceil_div(m, kRows), columns}, kThreads,
                        (kGradXFloats + 16 + 2 * kSome + 1) * 4, queue->stream, blocks_of(w, bits), map, grad,
                        m, w->n, w->k, tiles, grad_x));
}

memlm_status memlm_cuda_block_sparse_grad_values(const memlm_packed* w, int64_t m, const float* grad,
                                                 const float* x, float* grad_values,
                                                 memlm_cuda_queue* queue) {
  MEMLM_PASS(check_blocks(w, 32));
  MEMLM_PASS(check_rows(m, m > 0 && (!grad || !x)));
  Gpu gpu;
  MEMLM_PASS(find_gpu(MEMLM_F16, &gpu));
  MEMLM_CHECK(is_aligned(grad_values, 16), "grad_values: not 16-byte aligned");
  const int64_t most = ceil_div(ceil_div(w->k, kBlockK), kSome);  // thread blocks of a tile
  MEMLM_CHECK(most <= 65535, "k: got %lld, at most %d are accepted", static_cast<long long>(w->k),
              65535 * kSome * kBlockK);
  return started(launch(&grad_values_kernel, {ceil_div(w->n, kTile), most}, kThreads, kGradValuesFloats * 4,
                        queue->stream, w->starts, static_cast<const int32_t*>(w->places), grad, x, m, w->n,
                        w->k, grad_values));
}
