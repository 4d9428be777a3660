// Which probabilities attention drops: a hash of the seed and of the element's place says, so that no
// mask is stored and the result depends on neither tiles nor threads.  memlm/ops/attention.py specifies
// it.  What is constexpr serves csrc/cuda too.
#pragma once
#include <stdint.h>

namespace memlm {

constexpr uint32_t kGoldenRatio = 0x9E3779B9;  // 2^32 times its fraction

// lowbias32 of Chris Wellons' hash prospector: a permutation of 32 bits.
constexpr uint32_t mix32(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352d;
  x ^= x >> 15;
  x *= 0x846ca68b;
  return x ^ (x >> 16);
}

// The key of a row of probabilities: batch entry (or sequence) b, query head h, query i of it.
constexpr uint32_t dropout_row(uint64_t seed, int64_t b, int64_t h, int64_t i) {
  const uint32_t words[] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32),
                            static_cast<uint32_t>(b), static_cast<uint32_t>(h),
                            static_cast<uint32_t>(i)};
  uint32_t key = 0;
  for (const uint32_t word : words) key = mix32((key ^ word) + kGoldenRatio);
  return key;
}

// Hashes below this are dropped: p * 2^32, for p from 0 to below 1.
static inline uint32_t dropout_threshold(float p) {
  return static_cast<uint32_t>(static_cast<double>(p) * 4294967296.0);
}

// What the probabilities of keys j .. j + 15 are multiplied with: 0 or keep.
static inline void dropout_factors(uint32_t row, int64_t j, uint32_t threshold, float keep,
                                   float* factors) {
  const uint32_t first = row + static_cast<uint32_t>(j) * kGoldenRatio;
  for (uint32_t i = 0; i < 16; ++i)
    factors[i] = mix32(first + i * kGoldenRatio) < threshold ? 0.0f : keep;
}

}  // namespace memlm
