// What kv_append and paged_attention share: the numbers of a cache's layout (csrc/kv_blocks.h), how work is
// dealt out to sequences whose sizes the host does not know, and the Hadamard transform.
#ifndef MEMLM_CUDA_KV_H_
#define MEMLM_CUDA_KV_H_

#include "../kv_blocks.h"
#include "host.h"

namespace memlm::cuda {

constexpr int kKvTile = 16;  // tokens of a tile of keys, channels of one of values

// A memlm::KvBlock for kernels.
struct KvLayout {
  int tokens, dim, channels, width, group, groups, key_bits, value_bits;
  int key_tile, value_tile;  // bytes
  int64_t values, key_scales, value_scales, bytes;
};

struct KvCache {
  uint8_t *blocks, *tails;
  int64_t count, tail_count;
  KvLayout layout, tail;
  int piece;   // channels that a Hadamard transform mixes; 1: there is none
  float root;  // 1 / sqrt(piece)
  const int64_t *rows, *lengths;
  const int32_t *tables, *tail_of;
  int64_t table_stride;
  int sequences;
};

// Of a call's arguments, which it checks.
memlm_status kv_cache(const memlm_kv_pool* pool, const memlm_sequences* sequences, KvCache* cache);
memlm_status check_bounds(const memlm_cuda_bounds* bounds);

// The block of token t, and the tail, of a key-value head.
MEMLM_DEVICE uint8_t* block_of(const KvCache& c, int sequence, int head, int64_t t) {
  const int64_t block = c.tables[sequence * c.table_stride + t / c.layout.tokens];
  return c.blocks + (head * c.count + block) * c.layout.bytes;
}
MEMLM_DEVICE uint8_t* tail_of(const KvCache& c, int sequence, int head) {
  return c.tails + (head * c.tail_count + c.tail_of[sequence]) * c.tail.bytes;
}

// How items of work are dealt out: sequence s has those from rows[s] * times / per + s * more on.  With n new
// tokens it has at least n * times / per, rounded up, and more - 1 above that.  So the host, which knows all
// rows, knows how many there are.
struct Deal {
  int times, per, more;
};
MEMLM_DEVICE int64_t first_item(const int64_t* rows, int s, const Deal& d) {
  return rows[s] * d.times / d.per + static_cast<int64_t>(s) * d.more;
}
inline int64_t items(int64_t rows, int64_t sequences, const Deal& d) {
  return rows * d.times / d.per + sequences * d.more;
}

// The sequence that has an item; the last one for items beyond all.  For whole warps: each step looks at
// 32 sequences.
MEMLM_DEVICE int sequence_of(const int64_t* rows, int count, const Deal& d, int64_t item) {
  int low = 0, size = count;
  while (size > 1) {
    const int step = (size + kWarp - 1) / kWarp, at = lane() * step;
    const bool begun = at < size && first_item(rows, low + at, d) <= item;
    const int last = (count_bits(ballot(begun)) - 1) * step;
    low += last;
    size = step < size - last ? step : size - last;
  }
  return low;
}

// to [width] = the orthonormal Walsh-Hadamard transform of from [width], in pieces, by one warp, in shared
// memory; rounded as memlm/kv_formats.py says.
MEMLM_DEVICE void hadamard(const float* from, float* to, int width, int piece, float root) {
  for (int i = lane(); i < width; i += kWarp) {
    const float* const sixteen = from + i / 16 * 16;
    float sum = 0;
    for (int j = 0; j < 16; j++) {
      sum += count_bits(static_cast<uint32_t>(i & j)) % 2 ? -sixteen[j] : sixteen[j];
    }
    to[i] = piece == 16 ? sum * root : sum;
  }
  for (int step = 16; step < piece; step *= 2) {
    MEMLM_SYNC_WARP();
    const float factor = 2 * step == piece ? root : 1;
    for (int i = lane(); i < width / 2; i += kWarp) {
      float* const at = to + i / step * 2 * step + i % step;
      const float a = at[0], b = at[step];
      at[0] = (a + b) * factor;
      at[step] = (a - b) * factor;
    }
  }
  MEMLM_SYNC_WARP();
}

}  // namespace memlm::cuda

#endif
