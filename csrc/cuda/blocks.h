// What the functions over matrices of MEMLM_BLOCKS share.
#ifndef MEMLM_CUDA_BLOCKS_H_
#define MEMLM_CUDA_BLOCKS_H_

#include "host.h"

namespace memlm::cuda {

constexpr int kBlockK = 32;  // k of a block

inline bool are_floats(int bits) { return bits == 16 || bits == 32; }

// A matrix of blocks, of so many bits.
memlm_status check_blocks(const memlm_packed* w, int bits);

}  // namespace memlm::cuda

#endif
