// Rows of a 2:4 or unstructured W back to floats, computed in f32 as memlm/sparse_formats.py does, to the
// last bit: the code's number times the scale, rounded, then rounded to the result's type; 0 where nothing is
// stored.
//
// A block has a tile, 16 rows, and a stretch of its k, of which it takes 256 times 4 k at a time.  Of these a
// warp has 4 beside each other, lane (i, r), i = lane / 8, r = lane % 8, the i-th of them and rows r and r +
// 8: codes are read whole sectors at a time, and results of 16 and of 32 bits written in such.
//
// Where the codes of 16 rows x 4 k begin, in an unstructured matrix, follows from the bits before them: the
// block counts those before its stretch as it begins, and then those of each 256 times 4 k, one for each
// thread.  A tile has at most kMostChunks stretches, so that bits are read kMostChunks / 2 times in the mean
// at most.
#include <string.h>

#include "compressed.h"
#include "elements.h"

namespace memlm::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp, kTile = 16, kBits = 4;
constexpr int kStepFours = kThreads;                      // times 4 k, that a block takes at a time
constexpr int kLaneRows = 8, kWarpFours = kWarp / kLaneRows;  // side by side in a warp
constexpr int kMostChunks = 16;

struct Stored {
  const uint8_t *codes, *places, *scales;
  const int64_t* starts;
  int scale_bytes;   // of one
  float values[16];  // of codes
  int64_t row, count, first_tile;
  int k, fours, group, groups;   // fours: of a row; k in a group
  int chunks, chunk_fours;       // blocks side by side along k, and what each has
  bool wide;                     // four numbers of out may be stored at once
};

struct Shared {
  Vec2 bits[kStepFours];
  int begins[kStepFours];  // the byte of the tile's codes at which each 16 x 4 begins
  int of_warps[kWarps];
  float values[16];
};

// What the threads before have of `value`; `all`: what all have.  Uses of_warps, which is free for others
// behind the next barrier.
MEMLM_DEVICE int sum_before(int value, Shared* memory, int* all) {
  int sum = value;
  for (int by = 1; by < kWarp; by *= 2) {
    const int other = shuffle_up(sum, by);
    if (lane() >= by) sum += other;
  }
  if (lane() == kWarp - 1) memory->of_warps[warp()] = sum;
  MEMLM_SYNC_THREADS();
  int before = 0;
  *all = 0;
  for (int i = 0; i < kWarps; i++) {
    const int one = memory->of_warps[i];
    before += i < warp() ? one : 0;
    *all += one;
  }
  return before + sum - value;
}

// What is stored of a row's 4 k: a bit for each that is, and their codes in order, from the low nibble up.
struct RowFour {
  uint32_t mask, codes;
};

MEMLM_DEVICE RowFour two_of_four(uint32_t place, uint32_t codes) {
  return {1u << (place & 3) | 1u << (place >> 2), codes};
}

// codes: of the 16 x 4.  Not a byte behind the row's is read.
MEMLM_DEVICE RowFour any_of_four(Vec2 bits, int r, const uint8_t* codes) {
  const uint32_t half = r < 8 ? bits.x : bits.y;
  const int shift = r % 8 * 4;
  const uint32_t mask = half >> shift & 15;
  const int nibble = count_bits(half & ((1u << shift) - 1)) + (r < 8 ? 0 : count_bits(bits.x));
  const int end = nibble % 2 + count_bits(mask);
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < 3; i++) {
    if (2 * i < end) word |= static_cast<uint32_t>(codes[nibble / 2 + i]) << 8 * i;
  }
  return {mask, word >> nibble % 2 * 4};
}

template <bool unstructured, class T>
__global__ void __launch_bounds__(kThreads) sparse_rows_kernel(const Stored p, T* out) {
  Shared* const memory = shared<Shared>();
  if (thread() < 16) memory->values[thread()] = p.values[thread()];
  const int64_t tile = p.first_tile + block_x() / p.chunks;
  const int begin = block_x() % p.chunks * p.chunk_fours;
  const int end = begin + p.chunk_fours < p.fours ? begin + p.chunk_fours : p.fours;
  const uint8_t* const places = p.places + tile * p.fours * kPlaceBytes;
  const uint8_t* codes = p.codes + (unstructured ? 0 : tile * p.fours * kTile);
  int all = 0;
  if (unstructured) {
    int bytes = 0;
    for (int i = thread(); i < begin; i += kThreads)
      bytes += code_bytes(load<Vec2>(places + i * kPlaceBytes));
    sum_before(bytes, memory, &all);
    codes += p.starts[tile] + all;
  }
  MEMLM_SYNC_THREADS();

  for (int first = begin; first < end; first += kStepFours) {
    if (unstructured) {
      const int four = first + thread();
      const Vec2 bits = four < end ? load<Vec2>(places + four * kPlaceBytes) : Vec2{0, 0};
      memory->begins[thread()] = sum_before(code_bytes(bits), memory, &all);
      memory->bits[thread()] = bits;
      MEMLM_SYNC_THREADS();
    }
    for (int i = 0; i < kStepFours; i += kWarps * kWarpFours) {
      const int in_step = i + warp() * kWarpFours + lane() / kLaneRows;
      const int four = first + in_step, k = four * kFour;
      if (k >= p.k) break;
      const Vec2 bits = unstructured ? memory->bits[in_step] : load<Vec2>(places + four * kPlaceBytes);
#pragma unroll
      for (int half = 0; half < kTile; half += kLaneRows) {
        const int r = half + lane() % kLaneRows;
        const int64_t at = tile * kTile + r - p.row;
        if (at < 0 || at >= p.count) continue;
        const RowFour row = unstructured ? any_of_four(bits, r, codes + memory->begins[in_step])
                                         : two_of_four(place_of_row(bits, r), codes[four * kTile + r]);
        const float scale = scale_at(p.scales, p.scale_bytes, (tile * p.groups + k / p.group) * kTile + r);
        uint32_t left = row.codes;
        float numbers[kFour];
#pragma unroll
        for (int j = 0; j < kFour; j++) {
          const uint32_t have = row.mask >> j & 1;
          numbers[j] = have ? multiply(memory->values[left & 15], scale) : 0;
          left >>= have * kBits;
        }
        T* const to = out + at * p.k + k;
        if (p.wide) {  // k is a multiple of 4
          store_four(to, numbers);
        } else {
          for (int j = 0; j < kFour && k + j < p.k; j++) to[j] = from_float<T>(numbers[j]);
        }
      }
    }
    codes += unstructured ? all : 0;
  }
}

template <class T>
memlm_status begin(const Stored& p, int64_t blocks, void* out, void* stream) {
  const auto kernel = p.starts ? &sparse_rows_kernel<true, T> : &sparse_rows_kernel<false, T>;
  return started(launch(kernel, {blocks}, kThreads, sizeof(Shared), stream, p, static_cast<T*>(out)));
}

}  // namespace
}  // namespace memlm::cuda

using namespace memlm;
using namespace memlm::cuda;

memlm_status memlm_cuda_w4_sparse_dequantize(const memlm_packed* w, int64_t row, int64_t rows,
                                             memlm_dtype dtype, void* out, memlm_cuda_queue* queue) {
  MEMLM_PASS(check_compressed(w));
  MEMLM_PASS(check_rows_of(w, row, rows, dtype, out));
  Gpu gpu;
  MEMLM_PASS(find_gpu(MEMLM_F16, &gpu));
  if (!rows) return MEMLM_OK;

  Stored p = {};
  const int64_t k = padded_k(w), fours = k / kFour;
  p.codes = static_cast<const uint8_t*>(w->codes);
  p.places = static_cast<const uint8_t*>(w->places);
  p.scales = static_cast<const uint8_t*>(w->scales);
  p.starts = w->pattern == MEMLM_UNSTRUCTURED ? w->starts : nullptr;
  p.scale_bytes = bytes_of(w->scale_dtype);
  for (int q = 0; q < 16; q++) p.values[q] = w->levels ? w->levels[q] : static_cast<float>(q - 8);
  p.row = row;
  p.count = rows;
  p.first_tile = row / kTile;
  p.k = static_cast<int>(w->k);
  p.fours = static_cast<int>(fours);
  p.group = static_cast<int>(w->group);
  p.groups = static_cast<int>(k / w->group);
  const int64_t steps = ceil_div(fours, kStepFours), chunk_steps = ceil_div(steps, kMostChunks);
  p.chunks = static_cast<int>(ceil_div(steps, chunk_steps));
  p.chunk_fours = static_cast<int>(chunk_steps * kStepFours);
  p.wide = w->k % kFour == 0 && is_aligned(out, kFour * bytes_of(dtype));
  const int64_t tiles = (row + rows - 1) / kTile - p.first_tile + 1;
  MEMLM_CHECK(tiles <= INT32_MAX / p.chunks,
              "rows: got %lld of %lld numbers, which are too many for one call", static_cast<long long>(rows),
              static_cast<long long>(w->k));
  const auto run = dtype == MEMLM_F32 ? &begin<float> : dtype == MEMLM_F16 ? &begin<f16> : &begin<bf16>;
  return run(p, tiles * p.chunks, out, queue->stream);
}
