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
constexpr int kRowTile = 64;    // own rows of a thread block in the gradients, 16 a warp
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

  // Whether scores are products times a scale above 0, where seen, and weights multiply values as they are.
  bool plain() const { return scale > 0 && softcap <= 0 && !mask && !slopes && !dropped; }
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
  return tile + row * (kDim * 2) + (piece ^ (row & 7)) * 16;
}

// Rows of a sequence and a head that come to tiles.  A thread copies one piece of every kApart-th row.
template <int kDim>
struct Source {
  static constexpr int kPieces = kDim / 8, kApart = kAttentionThreads / kPieces;
  const Rows4& tensor;
  const uint16_t* own;  // the thread's piece of the first row that is its; what is beyond a row is not read

  MEMLM_DEVICE Source(const Rows4& tensor, int batch, int head, int first)
      : tensor(tensor),
        own(tensor.row(batch, head, first) + thread() / kPieces * tensor.strides[2] +
            (inside() ? piece() * 8 : 0)) {}
  MEMLM_DEVICE int piece() const { return thread() % kPieces; }
  MEMLM_DEVICE bool inside() const { return piece() * 8 < tensor.dim; }
};

// Begins to copy rows first .. first + rows - 1; the tile's others, up to kRows, become 0.
template <int kRows, int kDim>
MEMLM_DEVICE void copy_rows(const Source<kDim>& source, int first, int rows, uint8_t* tile) {
  constexpr int step = Source<kDim>::kApart;
  const Rows4& tensor = source.tensor;
  const int row0 = thread() / Source<kDim>::kPieces, piece = source.piece();
  const bool inside = source.inside();
  const uint16_t* x = source.own + first * tensor.strides[2];
  if (tensor.wide && rows >= kRows) {
#pragma unroll
    for (int n = 0; n < kRows / step; n++, x += step * tensor.strides[2])
      copy_async(piece_at<kDim>(tile, row0 + n * step, piece), x, inside);
    return;
  }
#pragma unroll 1
  for (int row = row0; row < kRows; row += step, x += step * tensor.strides[2]) {
    const bool valid = inside && row < rows;
    uint8_t* const to = piece_at<kDim>(tile, row, piece);
    if (tensor.wide) {
      copy_async(to, valid ? x : tensor.p, valid);
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

// Where a lane reads matrices of a tile: pieces `last`, 0 or 1, of a row, and with even_piece those an even
// number of pieces further.  The row's number turns bits 4 to 6 of an offset alone, so that constants do for
// pieces and for rows that are a multiple of 8 apart.
template <int kDim>
MEMLM_DEVICE int lane_offset(int row, int last) {
  return row * (kDim * 2) + (last ^ (row & 7)) * 16;
}
MEMLM_DEVICE int even_piece(int offset, int piece) { return (offset ^ piece % 8 * 16) + piece / 8 * 128; }

// sums [16 kHeight, 8 kColumns] = rows of a from row0 on, times columns that are rows of b.
template <class T, int kDim, int kHeight, int kColumns>
MEMLM_DEVICE void multiply_rows(const uint8_t* a, int row0, const uint8_t* b,
                                float (&sums)[kHeight][kColumns][4]) {
  const int r = lane() % 8, upper = lane() / 8 % 2, last = lane() / 16;
  const int of_a = lane_offset<kDim>(row0 + r + 8 * upper, last);
  const int of_b = lane_offset<kDim>(r + 8 * last, upper);
#pragma unroll
  for (int h = 0; h < kHeight; h++) {
#pragma unroll
    for (int t = 0; t < kColumns; t++) sums[h][t][0] = sums[h][t][1] = sums[h][t][2] = sums[h][t][3] = 0;
  }
#pragma unroll
  for (int d = 0; d < kDim / 16; d++) {
    uint32_t x[kHeight][4];
#pragma unroll
    for (int h = 0; h < kHeight; h++) load_matrices(x[h], a + even_piece(of_a, 2 * d) + h * (16 * kDim * 2));
#pragma unroll
    for (int t = 0; t < kColumns; t += 2) {
      uint32_t y[4];
      load_matrices(y, b + even_piece(of_b, 2 * d) + t * (8 * kDim * 2));
      const uint32_t y0[2] = {y[0], y[1]}, y1[2] = {y[2], y[3]};
#pragma unroll
      for (int h = 0; h < kHeight; h++) {
        mma<T>(sums[h][t], x[h], y0);
        mma<T>(sums[h][t + 1], x[h], y1);
      }
    }
  }
}

// sums [16 kHeight, kDim] += w [16 kHeight, 8 kRows], rounded to T, times rows of b.
template <class T, int kDim, int kHeight, int kRows>
MEMLM_DEVICE void multiply_weights(const float (&w)[kHeight][kRows][4], const uint8_t* b,
                                   float (&sums)[kHeight][kDim / 8][4]) {
  const int r = lane() % 8, upper = lane() / 8 % 2, last = lane() / 16;
  const int of_b = lane_offset<kDim>(r + 8 * upper, last);
#pragma unroll
  for (int k = 0; k < kRows / 2; k++) {
    uint32_t x[kHeight][4];
#pragma unroll
    for (int h = 0; h < kHeight; h++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float(&from)[4] = w[h][2 * k + i / 2];
        x[h][i] = pair<T>(from[i % 2 * 2], from[i % 2 * 2 + 1]);
      }
    }
#pragma unroll
    for (int t = 0; t < kDim / 8; t += 2) {
      uint32_t y[4];
      load_matrices_transposed(y, b + even_piece(of_b, t) + k * (16 * kDim * 2));
      const uint32_t y0[2] = {y[0], y[1]}, y1[2] = {y[2], y[3]};
#pragma unroll
      for (int h = 0; h < kHeight; h++) {
        mma<T>(sums[h][t], x[h], y0);
        mma<T>(sums[h][t + 1], x[h], y1);
      }
    }
  }
}

// The first column of matrices becomes the last, so that a loop over columns needs code for one.
template <int kColumns>
MEMLM_DEVICE void turn(float (&x)[kColumns][4]) {
#pragma unroll
  for (int e = 0; e < 4; e++) {
    const float first = x[0][e];
#pragma unroll
    for (int t = 1; t < kColumns; t++) x[t - 1][e] = x[t][e];
    x[kColumns - 1][e] = first;
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
  // otherwise, and any of them any.  Without branches, as all of these.
  MEMLM_DEVICE bool all_seen(int i, int i_last, int j, int j_last) const {
    return (j_last < place.k_len) & (j >= i_last + shift - a.left) & (j_last <= i + shift + a.right);
  }
  MEMLM_DEVICE bool any_seen(int i, int i_last, int j, int j_last) const {
    return (i < place.q_len) & (j < place.k_len) & (j_last >= i + shift - a.left) &
           (j <= i_last + shift + a.right);
  }
  MEMLM_DEVICE bool seen(int i, int j) const {
    const int position = i + shift;
    return (i < place.q_len) & (j < place.k_len) & (j >= position - a.left) & (j <= position + a.right);
  }

  // The score of query i and key j, both of the sequence, of their product; -Inf where not seen.  *factor:
  // how much of the score's gradient reaches the product.
  MEMLM_DEVICE float score(int i, int j, float product, float* factor) const {
    *factor = 1;
    if (!seen(i, j)) return -INFINITY;
    float s = product * a.scale;
    if (a.softcap > 0) {
      // tanh(x) = 1 - 2 / (exp(2 x) + 1)
      const float t = 1 - 2 / (exp2_approx(2 / a.softcap * s) + 1);
      s = a.softcap * kLog2E * t;
      *factor = 1 - t * t;
    }
    if (slope != 0) {
      const int away = j - i - shift;
      s = fma_f32(-slope, static_cast<float>(away < 0 ? -away : away), s);
    }
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
