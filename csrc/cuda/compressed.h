// What the functions over matrices of MEMLM_TWO_OF_FOUR and MEMLM_UNSTRUCTURED share: memlm/sparse_formats.py
// draws them.
#ifndef MEMLM_CUDA_COMPRESSED_H_
#define MEMLM_CUDA_COMPRESSED_H_

#include "host.h"

namespace memlm::cuda {

constexpr int kFour = 4;        // k that places speak of
constexpr int kPlaceBytes = 8;  // of 16 rows x 4 k

// Bytes of codes of 16 rows x 4 k of an unstructured matrix, whose bits are given.
MEMLM_DEVICE int code_bytes(Vec2 bits) { return (count_bits(bits.x) + count_bits(bits.y) + 1) / 2; }

// The place of row r of a tile in the bits of 4 k of 2:4: p0 | p1 << 2.
MEMLM_DEVICE uint32_t place_of_row(Vec2 bits, int r) { return (r % 2 ? bits.y : bits.x) >> r / 2 * 4 & 15; }

// A matrix of one of the two patterns, of 4 bits.
memlm_status check_compressed(const memlm_packed* w);

}  // namespace memlm::cuda

#endif
