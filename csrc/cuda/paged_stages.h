// The tokens of a sequence on their way into shared memory, a stage at a time: keys, then values, each with
// their scales.
#ifndef MEMLM_CUDA_PAGED_STAGES_H_
#define MEMLM_CUDA_PAGED_STAGES_H_

#include "paged_work.h"

namespace memlm::cuda::paged {

template <class K, class V, int tiles>
struct Stages {
  static constexpr int kStage = K::kStage, kRun = kActGroup, kRuns = kStage / kRun;

  // 32 tokens in one block: where the block is, or any where they are not there, and their first token in it.
  struct Run {
    const uint8_t* block;
    bool there;
    int place;
  };

  const KvLayout& f;
  const bool is_tail;
  const int lo, hi, last_block;
  const int32_t* const table;
  const uint8_t* const blocks;
  const uint32_t block_bytes;
  // In shared memory, tiles so many bytes apart.
  const int key_pitch, value_pitch, groups;
  uint8_t *const keys, *const values;
  uint16_t *const key_scales, *const value_scales;  // the latter of this stage and the next
  Run first_run = {}, last_run = {};                // of the stage whose keys were asked for last
  int next_block, next_place;
  int known, number = 0;  // each lane has a block's number

  MEMLM_DEVICE Stages(const PagedAttention& a, const Work& w, const Room& room, const KvLayout& layout,
                      const uint8_t* tail, int from, int to)
      : f(layout),
        is_tail(tail),
        lo(from),
        hi(to),
        last_block((to - 1) / layout.tokens),
        table(a.cache.tables + w.sequence * a.cache.table_stride),
        blocks(tail ? tail : a.cache.blocks + w.kv_head * a.cache.count * layout.bytes),
        block_bytes(static_cast<uint32_t>(layout.bytes)),
        key_pitch((layout.channels + 15) / 16 * 2 * kKvTile * K::kBits),
        value_pitch(kStage * 2 * V::kBits),
        groups(K::kCoded ? layout.groups : 0),
        keys(room.stage),
        values(keys + kStage / kKvTile * key_pitch),
        key_scales(reinterpret_cast<uint16_t*>(values + layout.width / kKvTile * value_pitch)),
        value_scales(key_scales + kStage * groups),
        next_block(from / kStage * kStage / layout.tokens),
        next_place(from / kStage * kStage - next_block * layout.tokens),
        known(next_block - kWarp) {}

  MEMLM_DEVICE Run run_of(int r) const { return kRuns == 1 || r == 0 ? first_run : last_run; }

  // Channels that the keys do not have, up to a multiple of 16.
  MEMLM_DEVICE void clear_padding() const {
    for (int i = f.key_tile / 16 + lane(); has_keys() && i < key_pitch / 16; i += kWarp) {
      store(keys + warp() * key_pitch + K::place(i) * 16, Vec4{0, 0, 0, 0});
    }
  }

  // Whether the warp has a tile of keys.
  MEMLM_DEVICE static bool has_keys() { return warp() < kStage / kKvTile; }

  // Finds the runs of the stage from `start` on.
  MEMLM_DEVICE void look_up(int start) {
    for (int r = 0; r < kRuns; r++) {
      if (!is_tail && next_block >= known + kWarp) {
        known += kWarp;
        number = known + lane() <= last_block ? table[known + lane()] : 0;
      }
      const int first = start + r * kRun;
      Run& run = r ? last_run : first_run;
      run = {blocks, first < hi && first + kRun > lo, next_place};
      if (!is_tail) {
        const int its = shuffle(number, next_block - known);
        run.block += static_cast<uint64_t>(static_cast<uint32_t>(run.there ? its : 0)) * block_bytes;
      }
      next_place += kRun;
      if (next_place == f.tokens) next_place = 0, next_block++;
    }
  }

  // The keys of the warp's tile; all scales.
  MEMLM_DEVICE void copy_keys(int turn) const {
    if (has_keys()) {
      const Run run = run_of(warp() / 2);
      const int place = (run.place >> 4) + warp() % 2, pieces = f.key_tile >> 4;
      const uint8_t* from = run.block + place * f.key_tile + lane() * 16;
      uint8_t* to = keys + warp() * key_pitch + K::place(lane()) * 16;
#pragma unroll 1
      for (int i = lane(); i < pieces; i += 4 * kWarp) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const int at = j * kWarp * 16;
          if (i + j * kWarp < pieces) copy_async(to + at, from + at, run.there);
        }
        from += 4 * kWarp * 16, to += 4 * kWarp * 16;
      }
      if (K::kCoded && lane() < 2 * groups) {
        copy_async(key_scales + (warp() * 2 * groups + lane()) * 8,
                   run.block + f.key_scales + (place * 2 * groups + lane()) * 16, run.there);
      }
    }
    if (K::kCoded && thread() < 8 * groups) {
      const int of = thread() / 8, r = thread() / 4 % 2, piece = thread() % 4;
      const Run run = run_of(r);
      copy_async(value_scales + (turn * groups + of) * kStage + r * kRun + piece * 8,
                 run.block + f.value_scales + (of * f.tokens + run.place) * 2 + piece * 16, run.there);
    }
  }

  // The values of the warp's channels.  Floats that are not there become 0: they may be NaN.
  MEMLM_DEVICE void copy_values(int start) const {
    constexpr int kPieces = kRun * 2 * V::kBits / 16, kOfToken = V::kCoded ? kPieces : kPieces / kRun;
    const int from = static_cast<int>(f.values) + warp() * f.value_tile;
    uint8_t* const to = values + warp() * value_pitch + V::place(lane()) * 16;
    const int last = f.width / kKvTile - warp();
#pragma unroll
    for (int j = 0; j < tiles; j++) {
      if (j * kWarps >= last) break;
#pragma unroll
      for (int n = 0; n < kRuns * kPieces / kWarp; n++) {
        const int i = lane() + n * kWarp, r = i / kPieces, piece = i % kPieces;
        const Run run = run_of(r);
        const bool valid = run.there && (V::kCoded || start + r * kRun + piece / kOfToken < hi);
        const int at = from + j * kWarps * f.value_tile + run.place * 2 * V::kBits + piece * 16;
        copy_async(to + j * kWarps * value_pitch + n * kWarp * 16, run.block + at, valid);
      }
    }
  }
};

}  // namespace memlm::cuda::paged

#endif
