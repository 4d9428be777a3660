// The vector vocabulary for ARMv8.2 with the dot product instructions.
#pragma once
#include "vec_neon-inl.h"

namespace memlm {
namespace MEMLM_ISA {

// Rows of x per register tile.  Fast: 16 integer sums, 4 registers of packed weights and 4 of their
// nibbles, mask and activation are 26 of 32 (the f32 sums are wanted once in 32 k, and stay in
// memory).  Accurate: 16 sums, 4 weights, scale, offset, mask and activation are 30; a fifth row
// would spill.
constexpr int kTileM = 4;
constexpr int kWideTiles = 1;
// Not measured: no such machine was at hand.
constexpr int kDirectTilesFast = 1, kDirectTilesAccurate = 1;

constexpr int kDotK = 4;
inline void b_interleave(B&, B&) {}

}  // namespace MEMLM_ISA
}  // namespace memlm
