// The orthonormal Walsh-Hadamard transform, its own inverse: before keys and values are rounded it
// spreads what few channels hold over all of them (QuaRot, arXiv:2404.00456).
#pragma once
#include <math.h>
#include <stdint.h>

namespace memlm {
namespace MEMLM_ISA {

// In place, of x [n], n a multiple of 32: by the largest power of two that divides n.
inline void hadamard(float* x, int64_t n) {
  const int64_t size = n & -n;
  for (int64_t i = 0; i < n; i += 16) {  // distances 8, 4, 2, 1
    for (int64_t step = 8; step >= 1; step /= 2)
      for (int64_t a = i; a < i + 16; a += 2 * step)
        for (int64_t j = a; j < a + step; ++j) {
          const float sum = x[j] + x[j + step], difference = x[j] - x[j + step];
          x[j] = sum;
          x[j + step] = difference;
        }
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
