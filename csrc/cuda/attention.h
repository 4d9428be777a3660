// What attention and its gradients share: arguments as kernels take them, tiles of rows in shared memory,
// products of tiles, and scores.
//
// Tiles are [rows][kDim], 16-bit; kDim is 64, 128 or 256, and what is beyond head_dim or v_dim is 0.  The
// pieces of 16 bytes of a row are turned about by the row's number, so that 8 rows of one column, and 8
// pieces of one row, meet all banks:
//
//           piece 0   1   2   3   4   5   6   7  | 8 ...
//   row 0         0   1   2   3   4   5   6   7
//       1         1   0   3   2   5   4   7   6
//       2         2   3   0   1   6   7   4   5
//       ...
#ifndef MEMLM_CUDA_ATTENTION_H_
#define MEMLM_CUDA_ATTENTION_H_

#include "../cpu/dropout.h"
#include "host.h"

namespace memlm::cuda {

constexpr int kAttentionThreads = 128;
constexpr int kRowTile = 64;    // rows of a thread block, 16 a warp
constexpr int kMaskUnit = 32;   // what mask_block is a multiple of
constexpr int kFar = 1 << 30;   // sequences are shorter
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;
constexpr int kMostDim = 256;

// [batch, heads, rows, dim]
struct Rows4 {
  uint16_t* p;
  int64_t strides[3];
  int dim;
  bool wide;  // rows consist of aligned pieces of 16 bytes

  MEMLM_DEVICE uint16_t* row(int64_t b, int64_t h, int64_t i) const {
    return p + b * strides[0] + h * strides[1] + i * strides[2];
  }
};

struct Attention {
  Rows4 q, k, v, out;
  float* lse;
  const int64_t *q_offsets, *k_offsets;
  int batch, heads, group;  // of query heads that share a key-value head
  int q_len, k_len;
  int left, right;  // kFar: no limit
  bool to_end;
  float scale;  // with log2(e), as all scores
  const void* mask;
  int64_t mask_strides[4];
  bool mask_is_bool;
  const uint8_t* block_mask;
  int64_t block_mask_strides[4];
  int mask_block;
  float softcap;
  const float *slopes, *sinks;
  uint32_t dropped;  // hashes below are; 0: none
  float kept;        // what others are multiplied with
  uint64_t seed;

  bool plain() const { return softcap <= 0 && !mask && !slopes && !dropped; }
};

// A tile of rows of one sequence and one head.
struct Place {
  int sequence, batch, head;
  int first;           // row of the sequence
  int q_first, k_first;  // rows of the tensors, with offsets
  int q_len, k_len;

  // Tiles of `size` rows along queries or keys.  With offsets, sequence s has those from floor(offset / size)
  // + s on, which suffice and leave some without rows.
  static constexpr int64_t count(const Attention& a, bool of_queries, int size) {
    const int length = of_queries ? a.q_len : a.k_len;
    return a.q_offsets ? length / size + a.batch : (length + size - 1) / size;
  }

  MEMLM_DEVICE Place(const Attention& a, bool of_queries, int size, int heads) {
    const int tiles = static_cast<int>(count(a, of_queries, size));
    // The last queries come first: with causal limits they take longest.
    const int tile = tiles - 1 - block_x() % tiles, rest = block_x() / tiles;
    head = rest % heads;
    batch = rest / heads;
    sequence = batch, first = tile * size, q_first = 0, k_first = 0, q_len = a.q_len, k_len = a.k_len;
    if (!a.q_offsets) return;
    const int64_t* const offsets = of_queries ? a.q_offsets : a.k_offsets;
    int low = 0, high = a.batch;  // low's tiles begin at or before this one
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (offsets[middle] / size + middle <= tile) low = middle;
      else high = middle;
    }
    sequence = low;
    first = (tile - static_cast<int>(offsets[low] / size) - low) * size;
    q_first = static_cast<int>(a.q_offsets[low]), k_first = static_cast<int>(a.k_offsets[low]);
    q_len = static_cast<int>(a.q_offsets[low + 1]) - q_first;
    k_len = static_cast<int>(a.k_offsets[low + 1]) - k_first;
  }

  MEMLM_DEVICE int shift(const Attention& a) const { return a.to_end ? k_len - q_len : 0; }
};

// ---- Tiles ----

template <int kDim>
MEMLM_DEVICE uint8_t* piece_at(uint8_t* tile, int row, int piece) {
  return tile + row * (kDim * 2) + (piece ^ row % 8) * 16;
}

// Begins to copy rows first .. first + kRows - 1 of those from `from` on; those for which `there(row)` does
// not hold become 0, and are not read.
template <int kDim, int kRows, class There>
MEMLM_DEVICE void copy_rows(const Rows4& tensor, const uint16_t* from, int64_t first, uint8_t* tile,
                            const There& there) {
  constexpr int pieces = kDim / 8;
#pragma unroll 4
  for (int i = thread(); i < kRows * pieces; i += kAttentionThreads) {
    const int row = i / pieces, piece = i % pieces;
    const bool valid = piece * 8 < tensor.dim && there(row);
    const uint16_t* const x = valid ? from + (first + row) * tensor.strides[2] + piece * 8 : tensor.p;
    uint8_t* const to = piece_at<kDim>(tile, row, piece);
    if (tensor.wide) {
      copy_async(to, x, valid);
    } else {
      uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
      for (int e = 0; e < 8; e++) {
        if (valid && piece * 8 + e < tensor.dim) words[e / 2] |= static_cast<uint32_t>(x[e]) << e % 2 * 16;
      }
      store(to, Vec4{words[0], words[1], words[2], words[3]});
    }
  }
}

// sums [16, 8 kColumns] += 16 rows of a from row0 on, times columns that are rows of b, from column0 on.
template <class T, int kDim, int kColumns>
MEMLM_DEVICE void multiply_rows(uint8_t* a, int row0, uint8_t* b, int column0, float (&sums)[kColumns][4]) {
  const int r = lane() % 8, upper = lane() / 8 % 2, last = lane() / 16;
#pragma unroll
  for (int d = 0; d < kDim / 16; d++) {
    uint32_t x[4];
    load_matrices(x, piece_at<kDim>(a, row0 + r + 8 * upper, 2 * d + last));
#pragma unroll
    for (int t = 0; t < kColumns; t += 2) {
      uint32_t y[4];
      load_matrices(y, piece_at<kDim>(b, column0 + 8 * (t + last) + r, 2 * d + upper));
      const uint32_t y0[2] = {y[0], y[1]}, y1[2] = {y[2], y[3]};
      mma<T>(sums[t], x, y0);
      mma<T>(sums[t + 1], x, y1);
    }
  }
}

// sums [16, kDim] += w [16, 8 kRows], rounded to T, times rows of b.
template <class T, int kDim, int kRows>
MEMLM_DEVICE void multiply_weights(const float (&w)[kRows][4], uint8_t* b, float (&sums)[kDim / 8][4]) {
  const int r = lane() % 8, upper = lane() / 8 % 2, last = lane() / 16;
#pragma unroll
  for (int k = 0; k < kRows / 2; k++) {
    const float(&w0)[4] = w[2 * k], (&w1)[4] = w[2 * k + 1];
    const uint32_t x[4] = {pair<T>(w0[0], w0[1]), pair<T>(w0[2], w0[3]), pair<T>(w1[0], w1[1]),
                           pair<T>(w1[2], w1[3])};
#pragma unroll
    for (int t = 0; t < kDim / 8; t += 2) {
      uint32_t y[4];
      load_matrices_transposed(y, piece_at<kDim>(b, 16 * k + 8 * upper + r, t + last));
      const uint32_t y0[2] = {y[0], y[1]}, y1[2] = {y[2], y[3]};
      mma<T>(sums[t], x, y0);
      mma<T>(sums[t + 1], x, y1);
    }
  }
}

// ---- Scores ----

// Of one sequence and head.
template <class T>
struct Scores {
  const Attention& a;
  const Place& place;
  int shift;
  float slope;
  const uint8_t* mask;
  const uint8_t* blocks;

  MEMLM_DEVICE Scores(const Attention& a, const Place& place, int head)
      : a(a),
        place(place),
        shift(place.shift(a)),
        slope(a.slopes ? a.slopes[head] * kLog2E : 0),
        mask(nullptr),
        blocks(nullptr) {
    if (a.mask) {
      const int64_t at = place.batch * a.mask_strides[0] + head * a.mask_strides[1];
      mask = static_cast<const uint8_t*>(a.mask) + at * (a.mask_is_bool ? 1 : 2);
    }
    if (a.block_mask)
      blocks = a.block_mask + place.batch * a.block_mask_strides[0] + head * a.block_mask_strides[1];
  }

  // Whether the block mask shows key j to query i.
  MEMLM_DEVICE bool shown(int i, int j) const {
    return !blocks ||
           blocks[i / a.mask_block * a.block_mask_strides[2] + j / a.mask_block * a.block_mask_strides[3]];
  }

  // Whether all queries from i to i_last see all keys from j to j_last, if block mask and mask do not say
  // otherwise.
  MEMLM_DEVICE bool all_seen(int i, int i_last, int j, int j_last) const {
    return i_last < place.q_len && j_last < place.k_len && j >= i_last + shift - a.left &&
           j_last <= i + shift + a.right;
  }

  // The score of query i and key j, both of the sequence, of their product; -Inf where not seen.  *factor:
  // how much of the score's gradient reaches the product.
  MEMLM_DEVICE float score(int i, int j, float product, float* factor) const {
    const int position = i + shift;
    *factor = 1;
    if (i >= place.q_len || j >= place.k_len || j < position - a.left || j > position + a.right)
      return -INFINITY;
    float s = product * a.scale;
    if (a.softcap > 0) {
      // tanh(x) = 1 - 2 / (exp(2 x) + 1)
      const float t = 1 - 2 / (exp2_approx(2 / a.softcap * s) + 1);
      s = a.softcap * kLog2E * t;
      *factor = 1 - t * t;
    }
    if (slope != 0) s = fma_f32(-slope, static_cast<float>(j > position ? j - position : position - j), s);
    if (mask) {
      const int64_t at = i * a.mask_strides[2] + j * a.mask_strides[3];
      if (a.mask_is_bool) {
        if (!mask[at]) s = -INFINITY;
      } else {
        s = fma_f32(to_float(reinterpret_cast<const T*>(mask)[at]), kLog2E, s);
      }
    }
    return s;
  }

  // What key j's hash for dropout is compared by, of a query's.
  MEMLM_DEVICE bool dropped(uint32_t row, int j) const {
    return mix32(row + static_cast<uint32_t>(j) * kGoldenRatio) < a.dropped;
  }
};

// Checks the arguments, and says them as kernels take them.
memlm_status prepare_attention(const memlm_attention_args* args, Gpu* gpu, Attention* attention);

Rows4 rows4(const void* p, const int64_t* strides, int64_t dim);

}  // namespace memlm::cuda

#endif
