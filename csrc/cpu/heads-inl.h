// What happens to heads of queries and keys between the projection and attention: RMSNorm
// (arXiv:1910.07467), as Qwen3 has it, and rotary positions (arXiv:2104.09864).
#pragma once
#include <math.h>

#include "attend-inl.h"
#include "dispatch.h"
#include "input-inl.h"

namespace memlm {
namespace MEMLM_ISA {

inline void store16(void* base, memlm_dtype dtype, int64_t i, int64_t count, F x) {
  alignas(64) float values[16];
  f_store(values, x);
  store_floats(base, dtype, i, count, values);
}

// One head, at element `at` of heads.x; the pairs (i, i + head_dim / 2) turn by the angle at cos, sin.
inline void turn_head(const Heads& h, int64_t at, const void* norm, const float* cos, const float* sin) {
  const int64_t half = h.head_dim / 2;
  const F factor = norm ? rms_factor(h.x, h.dtype, at, h.head_dim, h.norm_eps) : f_set1(1.0f);
  for (int64_t i = 0; i < half; i += 16) {
    const int64_t count = half - i < 16 ? half - i : 16;
    F a = load_floats(h.x, h.dtype, at + i, count);
    F b = load_floats(h.x, h.dtype, at + half + i, count);
    if (norm) {
      a = f_mul(f_mul(a, factor), load_floats(norm, h.dtype, i, count));
      b = f_mul(f_mul(b, factor), load_floats(norm, h.dtype, half + i, count));
    }
    const F c = load_floats(cos, MEMLM_F32, i, count), s = load_floats(sin, MEMLM_F32, i, count);
    store16(h.x, h.dtype, at + i, count, f_sub(f_mul(a, c), f_mul(b, s)));
    store16(h.x, h.dtype, at + half + i, count, f_fma(b, c, f_mul(a, s)));
  }
}

inline void turn_heads(const Heads& h, int64_t first_row, int64_t end_row) {
  for (int64_t row = first_row; row < end_row; ++row) {
    const int64_t angle = (h.positions ? h.positions[row] : row) * h.angle_stride;
    for (int64_t i = 0; i < h.heads + h.kv_heads; ++i)
      turn_head(h, row * h.stride + i * h.head_dim, i < h.heads ? h.q_norm : h.k_norm, h.cos + angle,
                h.sin + angle);
  }
}

}  // namespace MEMLM_ISA
}  // namespace memlm
