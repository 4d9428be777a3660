// What the functions over matrices of MEMLM_BLOCKS share.
#ifndef MEMLM_CUDA_BLOCKS_H_
#define MEMLM_CUDA_BLOCKS_H_

#include "elements.h"
#include "host.h"

namespace memlm::cuda {

constexpr int kBlockRows = 16, kBlockK = 32;  // of a block

// What reads a block's weights one by one, as floats.
struct Blocks {
  const uint8_t *codes, *scales, *offsets;
  int bits, scale_bytes;
  float numbers[16];  // what codes of up to 4 bits stand for

  // Copies the numbers to where weight() wants them; threads need a barrier behind it.
  MEMLM_DEVICE void put_numbers(float* shared) const {
    if (thread() < 16) shared[thread()] = numbers[thread()];
  }

  // Row r, k j of a block: as memlm/formats.py computes it, to the last bit.
  MEMLM_DEVICE float weight(const float* shared, int64_t block, int r, int j) const {
    const uint8_t* const from = codes + block * bits * 64;
    if (bits == 32) return load<float>(from + (j * kBlockRows + r) * 4);
    if (bits == 16) return to_float(load<bf16>(from + (j * kBlockRows + r) * 2));
    // Fields of 4 k each, the lowest first, in 64 bytes.
    const int fields = 8 / bits, in = j / 4;
    const int byte = from[in / fields * 64 + r * 4 + j % 4];
    const float number = bits == 8 ? static_cast<float>(static_cast<int8_t>(byte))
                                   : shared[byte >> in % fields * bits & ((1 << bits) - 1)];
    const int64_t at = block * kBlockRows + r;
    const float scaled = multiply(number, scale_at(scales, scale_bytes, at));
    return offsets ? scaled + scale_at(offsets, scale_bytes, at) : scaled;
  }
};

// Of checked blocks.
Blocks blocks_of(const memlm_packed* w, int bits);

inline bool are_floats(int bits) { return bits == 16 || bits == 32; }

// A matrix of blocks, of so many bits.
memlm_status check_blocks(const memlm_packed* w, int bits);

}  // namespace memlm::cuda

#endif
