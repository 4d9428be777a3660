// Rows of paged_attention.cu, each in a warp: queries on their way to products, and sums on theirs to
// results.
#ifndef MEMLM_CUDA_PAGED_ROWS_H_
#define MEMLM_CUDA_PAGED_ROWS_H_

#include "paged_work.h"

namespace memlm::cuda::paged {

// A row's numbers in a warp, up to 128 times n: lane l has number 4 (l + 32 i) + j at [i][j], 0 where there
// is none.
template <int n>
using Row = float[n][4];

// The orthonormal Walsh-Hadamard transform, in pieces of at least 32.
template <int n>
MEMLM_DEVICE void transform(Row<n>& x, int piece, float root) {
#pragma unroll
  for (float(&four)[4] : x) {
    const float a = four[0] + four[1], b = four[0] - four[1], c = four[2] + four[3], d = four[2] - four[3];
    four[0] = a + c, four[1] = b + d, four[2] = a - c, four[3] = b - d;
  }
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    if (4 * step >= piece) break;
    const float sign = lane() & step ? -1 : 1;
#pragma unroll
    for (float(&four)[4] : x) {
      for (float& one : four) one = fma_f32(one, sign, shuffle_xor(one, step));
    }
  }
  for (int j = 0; j < 4; j++) {
    const float sum = x[0][j] + x[n - 1][j], difference = x[0][j] - x[n - 1][j];
    if (n == 2 && piece == 8 * kWarp) x[0][j] = sum, x[n - 1][j] = difference;
    for (int i = 0; i < n; i++) x[i][j] *= root;
  }
}

// x plus the numbers [width] at `from`, in shared memory, times factor.
template <int n>
MEMLM_DEVICE void add_row(Row<n>& x, const float* from, float factor, int width) {
#pragma unroll
  for (int i = 0; i < n; i++) {
    const int first = 4 * (lane() + i * kWarp);
    if (first >= width) continue;
    const Vec4 four = load<Vec4>(from + first);
    const float its[4] = {as_float(four.x), as_float(four.y), as_float(four.z), as_float(four.w)};
    for (int j = 0; j < 4; j++) x[i][j] = fma_f32(its[j], factor, x[i][j]);
  }
}

// A row's sums, transformed back, times factor: to out.
template <class T, int n>
MEMLM_DEVICE void finish(const PagedAttention& a, Row<n>& x, float factor, int64_t row, int head) {
  const KvLayout& f = a.cache.layout;
  if (a.cache.piece > 1) transform<n>(x, a.cache.piece, a.cache.root);
  T* const to = static_cast<T*>(a.out) + row * a.out_stride + static_cast<int64_t>(head) * f.dim;
#pragma unroll
  for (int i = 0; i < n; i++) {
    for (int j = 0; j < 4; j++) {
      const int d = 4 * (lane() + i * kWarp) + j;
      if (d < f.dim) to[d] = from_float<T>(x[i][j] * factor);
    }
  }
}

// What the weights' sum becomes with a sink, relative to the larger of both, and the factor of what was
// relative to `maximum`.
MEMLM_DEVICE float normaliser(const PagedAttention& a, int head, float maximum, float total) {
  if (!a.sinks) return 1 / total;
  const float sink = a.sinks[head], base = sink > maximum ? sink : maximum;
  const float factor = exp2_approx((maximum - base) * kLog2E);
  return factor / fma_f32(total, factor, exp2_approx((sink - base) * kLog2E));
}

// Of queries in M; int8 has none.
template <class T, memlm_kv_type type>
constexpr int kQueryParts = type == MEMLM_KV_INT8 ? 0 : std::is_same_v<T, M> && type <= MEMLM_KV_BF16 ? 1 : 2;

// Queries into shared memory: as digits, and as the sum of `parts`.
template <class T, int parts, bool coded, int rows, int n>
MEMLM_DEVICE void load_queries(const PagedAttention& a, const Work& w, const Room& room) {
  const KvLayout& f = a.cache.layout;
  for (int row = warp(); row < rows; row += kWarps) {
    const int i = w.first + row;
    Row<n> x = {};
    if (row < w.rows) {
      const T* const from = static_cast<const T*>(a.q) + (w.first_row + i / a.group) * a.q_stride +
                            static_cast<int64_t>(w.kv_head * a.group + i % a.group) * f.dim;
      for (int k = 0; k < n; k++) {
        for (int j = 0; j < 4; j++) {
          const int d = 4 * (lane() + k * kWarp) + j;
          if (d < f.dim) x[k][j] = coded ? to_float(from[d]) * a.scale : to_float(from[d]);
        }
      }
      if (coded) transform<n>(x, a.cache.piece, a.cache.root);
    }
    float per_step = 0;
    if constexpr (coded) {
      uint32_t most = 0;
      for (const auto& four : x) {
        for (const float one : four) most = largest(most, one);
      }
      for (int mask = kWarp / 2; mask; mask /= 2) {
        const uint32_t other = shuffle_xor(most, mask);
        most = other > most ? other : most;
      }
      per_step = most ? kMostDigits / as_float(most) : 0;
      if (lane() == 0) room.steps[row] = as_float(most) * (1.f / kMostDigits);
    }
    for (int k = 0; k < n; k++) {
      const int unit = lane() + k * kWarp;  // of four channels
      if (4 * unit >= f.width) continue;
      if constexpr (coded) {
        const int at = (unit / 8 * (rows / 8) + row / 8) * kWarp + row % 8 * 4 + unit % 8 / 2;
        uint32_t* const to = reinterpret_cast<uint32_t*>(room.codes + at) + unit % 2;
        const Vec2 both = digits(x[k], per_step);
        to[0] = both.x, to[2] = both.y;
      }
      if constexpr (parts > 0) {
        const int at = (unit / 4 * (rows / 8) + row / 8) * kWarp + row % 8 * 4 + unit % 4;
        store(room.pairs + at * sizeof(Pairs<parts>), pairs_of<parts>(x[k]));
      }
    }
  }
}

}  // namespace memlm::cuda::paged

#endif
