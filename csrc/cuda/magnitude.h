// The largest magnitude of numbers, which says how they are rounded.
#ifndef MEMLM_CUDA_MAGNITUDE_H_
#define MEMLM_CUDA_MAGNITUDE_H_

#include "device.h"

namespace memlm::cuda {

// Of magnitudes as bits, whose order is that of the numbers, Inf and then NaN the largest.
constexpr uint32_t kInfinity = 0x7f800000;

MEMLM_DEVICE uint32_t magnitude(float x) { return as_bits(x) & 0x7fffffff; }

MEMLM_DEVICE uint32_t largest_of_warp(uint32_t value) {
  for (int mask = kWarp / 2; mask; mask /= 2) {
    const uint32_t other = shuffle_xor(value, mask);
    value = other > value ? other : value;
  }
  return value;
}

}  // namespace memlm::cuda

#endif
