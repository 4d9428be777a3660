// The softmax of paged attention: scores of a stage, by rows, become weights.
#ifndef MEMLM_CUDA_PAGED_SOFTMAX_H_
#define MEMLM_CUDA_PAGED_SOFTMAX_H_

#include <math.h>

#include "paged_stages.h"

namespace memlm::cuda::paged {

// The thread's row, its tokens: `kPieces` times kNext that follow each other.  Which is which differs from
// row to row: they lie on other banks then.
template <class K, class V, int weight_parts, int columns>
struct Softmax {
  static constexpr int kStage = K::kStage, kRows = 8 * columns, kOfRow = kThreads / kRows;
  static constexpr int kEach = kStage / kOfRow, kNext = kEach < 4 ? kEach : 4, kPieces = kEach / kNext;

  const PagedAttention& a;
  const Work& w;
  const Room& room;
  const int row, turned, swapped, other_unit, odd, position;
  int begin;
  uint32_t seen;  // from begin on
  float slope;
  bool has_rows;  // the warp

  MEMLM_DEVICE Softmax(const PagedAttention& attention, const Work& work, const Room& its_room, int lo,
                       int hi)
      : a(attention),
        w(work),
        room(its_room),
        row(thread() / kOfRow),
        turned(row >> 1 & (kPieces - 1) & 1),
        swapped((row >> 1 & 3) * 8),
        other_unit((row >> 1 & 1) * 4),
        odd(row % 2 * 2),
        position(w.before + (w.first + row) / a.group) {
    const int end = row < w.rows ? static_cast<int>(least(position + 1, hi)) : 0;
    const bool is_cut = a.window && position >= a.window;
    begin = is_cut ? static_cast<int>(most(position - a.window + 1, lo)) : lo;
    seen = end > begin ? end - begin : 0;
    slope = a.slopes ? a.slopes[w.kv_head * a.group + (w.first + row) % a.group] : 0;
    has_rows = warp() * kWarp / kOfRow < w.rows;
  }

  MEMLM_DEVICE int token_of(int piece) const {
    return (piece ^ turned) * kOfRow * kNext + thread() % kOfRow * kNext;
  }

  // The row's exponentials relative to the largest so far, and what that does to its sums till now.
  template <int tiles>
  MEMLM_DEVICE void weigh(const float* line, int start, State<columns, tiles>& state,
                          float (&p)[kPieces][4]) const {
    float best = -INFINITY;
    float of_scores = w.factor;
    if constexpr (K::kCoded) of_scores = room.steps[row] * (1.f / K::kUnit);
#pragma unroll
    for (int n = 0; n < kPieces; n++) {
      const int token = token_of(n);
      if constexpr (kNext == 4) {
        const Vec4 four = load<Vec4>(line + (token ^ swapped));
        p[n][0] = as_float(four.x), p[n][1] = as_float(four.y);
        p[n][2] = as_float(four.z), p[n][3] = as_float(four.w);
      } else {
        const Vec2 two = load<Vec2>(line + (token ^ swapped));
        p[n][0] = as_float(two.x), p[n][1] = as_float(two.y);
      }
#pragma unroll
      for (int j = 0; j < kNext; j++) {
        float s = p[n][j] * of_scores;
        // tanh x = 1 - 2 / (e^2x + 1)
        if (a.softcap > 0) s = a.softcap * (1 - 2 / (exp2_approx(s / a.softcap * (2 * kLog2E)) + 1));
        if (a.slopes) s = fma_f32(slope, static_cast<float>(start + token + j - position), s);
        p[n][j] = static_cast<uint32_t>(start + token + j - begin) < seen ? s : -INFINITY;
        best = larger(best, p[n][j]);
      }
    }
    for (int mask = kOfRow / 2; mask; mask /= 2) best = larger(best, shuffle_xor(best, mask));
    best = larger(best, state.maximum);
    const float base = best == -INFINITY ? 0 : best, factor = exp2_approx((state.maximum - base) * kLog2E);
    // Sums of consecutive tokens first, however many threads a row has: its total is the same.
    float sums[kPieces];
#pragma unroll
    for (int n = 0; n < kPieces; n++) {
#pragma unroll
      for (int j = 0; j < kNext; j++) p[n][j] = exp2_approx((p[n][j] - base) * kLog2E);
      sums[n] = p[n][0] + p[n][1];
      if (kNext == 4) sums[n] += p[n][2] + p[n][3];
      for (int mask = 1; mask < kOfRow; mask *= 2) sums[n] += shuffle_xor(sums[n], mask);
    }
#pragma unroll
    for (int step = 1; step < kPieces; step *= 2) {
      for (int n = 0; n + step < kPieces; n += 2 * step) sums[n] += sums[n + step];
    }
    state.maximum = best;
    state.total = fma_f32(state.total, factor, sums[0]);
    if (thread() % kOfRow == 0) room.factors[row] = factor;
  }

  // Weights times the values' scales, as digits with a step for each group of channels.
  MEMLM_DEVICE void store_digits(const float (&p)[kPieces][4], float* line, const uint16_t* value_scales,
                                 int groups) const {
    for (int of = 0; of < groups; of++) {
      float x[kPieces][4];
      uint32_t most = 0;
#pragma unroll
      for (int n = 0; n < kPieces; n++) {
        const int token = token_of(n);
        const Vec2 four = load<Vec2>(value_scales + of * kStage + token);
        const float scales[4] = {low<f16>(four.x), high<f16>(four.x), low<f16>(four.y),
                                 high<f16>(four.y)};
        for (int j = 0; j < 4; j++) {
          // The scales of tokens that are not there may be NaN.
          x[n][j] = p[n][j] != 0 ? p[n][j] * scales[j] : 0;
          most = largest(most, x[n][j]);
        }
      }
      for (int mask = kOfRow / 2; mask; mask /= 2) {
        const uint32_t other = shuffle_xor(most, mask);
        most = other > most ? other : most;
      }
      const float per_step = most ? kMostDigits / as_float(most) : 0;
#pragma unroll
      for (int n = 0; n < kPieces; n++) {
        const int token = token_of(n);
        const Vec2 both = digits(x[n], per_step);
        uint32_t* const to = reinterpret_cast<uint32_t*>(line) + of * 32 + token / 8 * 4 + token / 4 % 2;
        // Of two rows, a half of 32 banks apart, one stores its low digits first.
        to[odd] = row % 2 ? both.y : both.x;
        to[odd ^ 2] = row % 2 ? both.x : both.y;
      }
      if (thread() % kOfRow == 0) {
        room.weight_steps[of * kRows + row] = as_float(most) * (1.f / kMostDigits / V::kUnit);
      }
    }
  }

  MEMLM_DEVICE void store_pairs(const float (&p)[kPieces][4], float* line) const {
#pragma unroll
    for (int n = 0; n < kPieces; n++) {
      const int token = token_of(n);
      const Pairs<weight_parts> x = pairs_of<weight_parts>(p[n]);
      float* const to = line + ((token / 4) ^ other_unit) * 2 * weight_parts;
      if constexpr (kNext == 4) {
        store(to, x);
      } else {
        for (int q = 0; q < weight_parts; q++) store(to + 2 * q + token / 2 % 2, x.of[q][0]);
      }
    }
  }
};

}  // namespace memlm::cuda::paged

#endif
