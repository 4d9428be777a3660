// The orthonormal Walsh-Hadamard transform, its own inverse: before keys and values are rounded it
// spreads what few channels hold over all of them (QuaRot, arXiv:2404.00456).
#pragma once
#include <math.h>
#include <stdint.h>

namespace memlm {
namespace MEMLM_ISA {

// The transform of 16 numbers: +1, or -1 where i & j has an odd number of bits.
struct Signs {
  float v[16][16];
  constexpr Signs() : v() {
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 16; ++j) {
        const int both = i & j;
        v[i][j] = ((both ^ both >> 1 ^ both >> 2 ^ both >> 3) & 1) ? -1 : 1;
      }
  }
};

// In place, of x [n], n a multiple of 32: by the largest power of two that divides n.
inline void hadamard(float* x, int64_t n) {
  alignas(64) static constexpr Signs signs;
  const int64_t size = n & -n;
  for (int64_t i = 0; i < n; i += 16) {
    F sums = f_zero();
    for (int j = 0; j < 16; ++j) sums = f_fma(f_set1(x[i + j]), f_load(signs.v[j]), sums);
    f_store(x + i, sums);
  }
  for (int64_t step = 16; step < size; step *= 2)
    for (int64_t a = 0; a < n; a += 2 * step)
      for (int64_t j = a; j < a + step; j += 16) {
        const F low = f_load(x + j), high = f_load(x + j + step);
        f_store(x + j, f_add(low, high));
        f_store(x + j + step, f_sub(low, high));
      }
  const F factor = f_set1(1 / sqrtf(static_cast<float>(size)));
  for (int64_t i = 0; i < n; i += 16) f_store(x + i, f_mul(f_load(x + i), factor));
}

}  // namespace MEMLM_ISA
}  // namespace memlm
