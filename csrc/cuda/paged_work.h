// What a block of paged_attention.cu is given to do, and where it does it.
#ifndef MEMLM_CUDA_PAGED_WORK_H_
#define MEMLM_CUDA_PAGED_WORK_H_

#include "paged_tiles.h"

namespace memlm::cuda::paged {

constexpr int kThreads = 128, kWarps = kThreads / kWarp;
constexpr int kMostDim = 256;
constexpr int kSplitRows = 16;                       // of a sequence whose length is shared out
constexpr int kLeastChunk = 256, kMostChunks = 32;   // tokens; blocks of a sequence
constexpr float kLog2E = 1.44269504f;

struct PagedAttention {
  KvCache cache;
  const void* q;
  void* out;
  int64_t q_stride, out_stride;
  int heads, group, window;
  float scale, softcap;
  const float *slopes, *sinks;
  int stage_bytes;  // that a stage, and at last the sums, take of shared memory
  int pitch;        // Room's
  // Of sequences with at most split_tokens new tokens, each chunk's sums [width], maximum and total, for
  // each slot and head.  A slot is a row, or where those would be more: split_tokens of each sequence.
  int splits, split_tokens, chunk;
  bool slots_are_rows;
  float *sums, *totals;
};

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

MEMLM_DEVICE int64_t part_of(const PagedAttention& a, int sequence, int64_t row, int token, int head,
                             int split) {
  const int64_t slot = a.slots_are_rows ? row : static_cast<int64_t>(sequence) * a.split_tokens + token;
  return (slot * a.heads + head) * a.splits + split;
}

// ---- The work of a block ----

template <int columns, int tiles>  // tiles of 8 query rows; of 16 channels, for each warp
struct State {
  float sums[tiles][columns][4];
  float maximum, total;  // of the row that the thread does the softmax of
};

struct Work {
  int sequence, kv_head, rows;
  int64_t first_row;
  int before;    // tokens before the first new one
  int first;     // of the sequence's query rows
  float factor;  // of scores
};

// In shared memory.  What is multiplied lies as lanes load it: for 16 or 32 k, each 8 rows, each lane (g, c)
// what it has of row g.
struct Room {
  uint8_t* stage;
  Vec4* codes;     // queries as digits [channels / 32][rows / 8][32]
  uint8_t* pairs;  // as Pairs [channels / 16][rows / 8][32]
  float* steps;    // [rows]: what 1 is, of the digits
  // Of each row its scores of a stage, then its weights: Pairs [tokens / 16][4], or digits [groups][2][4].
  // Rows are 16 words apart, of 32 banks.  lines_of() of all: of this stage and the next.
  float* lines;
  int pitch;
  float* factors;       // [rows]: of the sums till now
  float* weight_steps;  // [groups][rows]
};

// Of many rows there is no room for two, nor need: more is done between barriers.
constexpr int lines_of(int rows) { return rows == 8 ? 2 : 1; }

}  // namespace memlm::cuda::paged

#endif
