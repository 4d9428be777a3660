// Constants of the packed formats.  memlm/formats.py specifies them; a test compares the two.
#pragma once
#include <stdint.h>

namespace memlm {
// static: the per-ISA files must not share a copy compiled for one of them.

constexpr int kFormatVersion = 1;
constexpr int kTileRows = 16;  // rows of W side by side in a block
constexpr int kLaneK = 4;      // consecutive k of one row inside a 32-bit lane
constexpr int kActGroup = 32;  // activations share a scale over 32 k
constexpr int kBlock = kTileRows * kLaneK;
constexpr int kPlaceBytes = 8;  // sparse: 64 bits for each 16 rows x 4 k

static_assert(kBlock == 64, "a block is one 512-bit register and one cache line");

static constexpr int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// k rounded up to a whole number of groups and of activation groups.
static constexpr int64_t padded_k(int64_t k, int64_t group) {
  const int64_t step = group > kActGroup ? group : kActGroup;  // a power of two
  return (k + step - 1) & -step;
}

// Bytes of codes of one tile.
static constexpr int64_t tile_bytes(int bits, int64_t padded) { return padded * kTileRows * bits / 8; }

}  // namespace memlm
