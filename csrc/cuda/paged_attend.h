// What a block of paged_attention.cu does with the tokens of a sequence: scores, softmax, sums.
#ifndef MEMLM_CUDA_PAGED_ATTEND_H_
#define MEMLM_CUDA_PAGED_ATTEND_H_

#include <math.h>

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

// All tokens from lo to hi - 1: into `state`.  `prepare` is called once the first keys are on their way.
template <class K, class V, int query_parts, int weight_parts, int columns, int tiles, class Prepare>
MEMLM_DEVICE void attend(const PagedAttention& a, const Work& w, const Room& room, const KvLayout& f,
                         const uint8_t* tail, int lo, int hi, State<columns, tiles>& state,
                         const Prepare& prepare) {
  constexpr int kStage = K::kStage, kRows = 8 * columns, kOfRow = kThreads / kRows;
  constexpr int kRun = kActGroup;
  const int key_pitch = (f.channels + 15) / 16 * 2 * kKvTile * K::kBits, value_pitch = kStage * 2 * V::kBits;
  const int groups = K::kCoded ? f.groups : 0, g = lane() / 4, c = lane() % 4;

  uint8_t* const all_keys = room.stage;
  uint8_t* const all_values = all_keys + kStage / kKvTile * key_pitch;
  uint16_t* const all_key_scales = reinterpret_cast<uint16_t*>(all_values + f.width / kKvTile * value_pitch);
  uint16_t* const all_value_scales = all_key_scales + kStage * groups;  // of this stage and the next

  // The runs of the stage whose keys were asked for last, of 32 tokens in one block: where the block is, or
  // any where they are not there, and their first token in it.
  constexpr int kRuns = kStage / kRun;
  struct Run {
    const uint8_t* block;
    bool there;
    int place;
  };
  const int32_t* const table = a.cache.tables + w.sequence * a.cache.table_stride;
  const uint8_t* const blocks = tail ? tail : a.cache.blocks + w.kv_head * a.cache.count * f.bytes;
  const uint32_t block_bytes = static_cast<uint32_t>(f.bytes);
  const int last_block = (hi - 1) / f.tokens;
  Run first_run = {}, last_run = {};
  const auto run_of = [&](int r) { return kRuns == 1 || r == 0 ? first_run : last_run; };
  int next_block = lo / kStage * kStage / f.tokens, next_place = lo / kStage * kStage - next_block * f.tokens;
  // Each lane has a block's number.
  int known = next_block - kWarp, number = 0;
  const auto look_up = [&](int start) {
    for (int r = 0; r < kRuns; r++) {
      if (!tail && next_block >= known + kWarp) {
        known += kWarp;
        number = known + lane() <= last_block ? table[known + lane()] : 0;
      }
      const int first = start + r * kRun;
      Run& run = r ? last_run : first_run;
      run = {blocks, first < hi && first + kRun > lo, next_place};
      if (!tail) {
        const int its = shuffle(number, next_block - known);
        run.block += static_cast<uint64_t>(static_cast<uint32_t>(run.there ? its : 0)) * block_bytes;
      }
      next_place += kRun;
      if (next_place == f.tokens) next_place = 0, next_block++;
    }
  };
  // The keys of the warp's tile; all scales.
  const auto copy_keys = [&](int turn) {
    if (warp() < kStage / kKvTile) {
      const Run run = run_of(warp() / 2);
      const int place = (run.place >> 4) + warp() % 2, pieces = f.key_tile >> 4;
      const uint8_t* keys = run.block + place * f.key_tile + lane() * 16;
      uint8_t* to = all_keys + warp() * key_pitch + K::place(lane()) * 16;
#pragma unroll 1
      for (int i = lane(); i < pieces; i += 4 * kWarp) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const int at = j * kWarp * 16;
          if (i + j * kWarp < pieces) copy_async(to + at, keys + at, run.there);
        }
        keys += 4 * kWarp * 16, to += 4 * kWarp * 16;
      }
      if (K::kCoded && lane() < 2 * groups) {
        copy_async(all_key_scales + (warp() * 2 * groups + lane()) * 8,
                   run.block + f.key_scales + (place * 2 * groups + lane()) * 16, run.there);
      }
    }
    if (K::kCoded && thread() < 8 * groups) {
      const int of = thread() / 8, r = thread() / 4 % 2, piece = thread() % 4;
      const Run run = run_of(r);
      copy_async(all_value_scales + (turn * groups + of) * kStage + r * kRun + piece * 8,
                 run.block + f.value_scales + (of * f.tokens + run.place) * 2 + piece * 16, run.there);
    }
  };
  // The values of the warp's channels.  Floats that are not there become 0: they may be NaN.
  const auto copy_values = [&](int start) {
    constexpr int kPieces = kRun * 2 * V::kBits / 16, kOfToken = V::kCoded ? kPieces : kPieces / kRun;
    const int values = static_cast<int>(f.values) + warp() * f.value_tile;
    uint8_t* const to = all_values + warp() * value_pitch + V::place(lane()) * 16;
    const int last = f.width / kKvTile - warp();
#pragma unroll
    for (int j = 0; j < tiles; j++) {
      if (j * kWarps >= last) break;
#pragma unroll
      for (int n = 0; n < kRuns * kPieces / kWarp; n++) {
        const int i = lane() + n * kWarp, r = i / kPieces, piece = i % kPieces;
        const Run run = run_of(r);
        const bool valid = run.there && (V::kCoded || start + r * kRun + piece / kOfToken < hi);
        const int at = values + j * kWarps * f.value_tile + run.place * 2 * V::kBits + piece * 16;
        copy_async(to + j * kWarps * value_pitch + n * kWarp * 16, run.block + at, valid);
      }
    }
  };

  // Channels that the keys do not have, up to a multiple of 16.
  for (int i = f.key_tile / 16 + lane(); warp() < kStage / kKvTile && i < key_pitch / 16; i += kWarp) {
    store(all_keys + warp() * key_pitch + K::place(i) * 16, Vec4{0, 0, 0, 0});
  }

  // The thread's row of the softmax, its tokens: `pieces` times kNext that follow each other.  Which is which
  // differs from row to row: they lie on other banks then.
  constexpr int kEach = kStage / kOfRow, kNext = kEach < 4 ? kEach : 4, kPieces = kEach / kNext;
  const int row = thread() / kOfRow, turned = row >> 1 & (kPieces - 1) & 1, i = w.first + row;
  const int swapped = (row >> 1 & 3) * 8, other_unit = (row >> 1 & 1) * 4, odd = row % 2 * 2;
  const int position = w.before + i / a.group;
  const int end = row < w.rows ? static_cast<int>(least(position + 1, hi)) : 0;
  const bool is_cut = a.window && position >= a.window;
  const int begin = is_cut ? static_cast<int>(most(position - a.window + 1, lo)) : lo;
  const uint32_t seen = end > begin ? end - begin : 0;
  const float slope = a.slopes ? a.slopes[w.kv_head * a.group + i % a.group] : 0;
  const bool has_rows = warp() * kWarp / kOfRow < w.rows;  // the warp

  const int first = lo / kStage * kStage;
  look_up(first);
  copy_keys(0);
  commit_copies();
  prepare();
  MEMLM_SYNC_THREADS();
  for (int start = first, turn = 0; start < hi; start += kStage, turn ^= 1) {
    MEMLM_SYNC_WARP();  // the last stage's values are not needed any more
    copy_values(start);
    commit_copies();
    wait_copies<1>();
    MEMLM_SYNC_WARP();  // the keys are there
    float* const lines = room.lines + (lines_of(kRows) == 2 ? turn * kRows * room.pitch : 0);
    if (lines_of(kRows) == 1) MEMLM_SYNC_THREADS();  // the last weights are not needed any more

    if (warp() < kStage / kKvTile) {
      const uint8_t* const tile = all_keys + warp() * key_pitch;
      float scores[columns][4] = {};
      if constexpr (K::kCoded) {
        const Vec4* codes = room.codes + lane();
        for (int of = 0, k0 = 0; of < groups; of++) {
          int high[columns][4] = {}, low[columns][4] = {};
          const auto multiply = [&] {
            uint32_t keys[4];
            K::load32(tile, k0, keys);
#pragma unroll
            for (int n = 0; n < columns; n++) {
              add_product(high[n], low[n], keys, load<Vec4>(codes + n * kWarp));
            }
            k0 += 32, codes += columns * kWarp;
          };
          multiply();
          if (f.group == 64) multiply();
          const uint32_t both = load<uint32_t>(all_key_scales + (warp() * groups + of) * kKvTile + 2 * g);
          const float scales[2] = {to_float(f16{static_cast<uint16_t>(both)}),
                                   to_float(f16{static_cast<uint16_t>(both >> 16)})};
#pragma unroll
          for (int n = 0; n < columns; n++) {
            for (int j = 0; j < 4; j++) {
              scores[n][j] = fma_f32(sum_of(high[n][j], low[n][j]), scales[j / 2], scores[n][j]);
            }
          }
        }
      } else {
#pragma unroll 4
        for (int k0 = 0; k0 < f.channels; k0 += 16) {
#pragma unroll
          for (int part = 0; part < K::kParts; part++) {
            uint32_t keys[4];
            K::load16(tile, k0, part, keys);
#pragma unroll
            for (int n = 0; n < columns; n++) {
              const auto x = load<Pairs<query_parts>>(
                  room.pairs + ((k0 / 16 * columns + n) * kWarp + lane()) * sizeof(Pairs<query_parts>));
#pragma unroll
              for (int q = 0; q < query_parts; q++) mma<M>(scores[n], keys, x.of[q]);
            }
          }
        }
      }
      // On other banks for each of a lane's rows.
#pragma unroll
      for (int n = 0; n < columns; n++) {
        for (int j = 0; j < 2; j++) {
          float* const to = lines + (n * 8 + 2 * c + j) * room.pitch;
          if (K::kCoded) {
            store(to + ((warp() * kKvTile + 2 * g) ^ 8 * c),
                  Vec2{as_bits(scores[n][j]), as_bits(scores[n][j + 2])});
          } else {
            to[(warp() * kKvTile + g) ^ 8 * c] = scores[n][j];
            to[(warp() * kKvTile + g + 8) ^ 8 * c] = scores[n][j + 2];
          }
        }
      }
    }
    MEMLM_SYNC_WARP();  // the keys are not needed any more
    if (start + kStage < hi) {
      look_up(start + kStage);
      copy_keys(turn ^ 1);
    }
    commit_copies();
    MEMLM_SYNC_THREADS();  // the scores are there

    if (has_rows) {
      float* const line = lines + row * room.pitch;
      float p[kPieces][4] = {}, best = -INFINITY;
      float of_scores = w.factor;
      if constexpr (K::kCoded) of_scores = room.steps[row] * (1.f / K::kUnit);
#pragma unroll
      for (int n = 0; n < kPieces; n++) {
        const int token = (n ^ turned) * kOfRow * kNext + thread() % kOfRow * kNext;
        if constexpr (kNext == 4) {
          const Vec4 four = load<Vec4>(line + (token ^ swapped));
          p[n][0] = as_float(four.x), p[n][1] = as_float(four.y);
          p[n][2] = as_float(four.z), p[n][3] = as_float(four.w);
        } else {
          const Vec2 two = load<Vec2>(line + (token ^ swapped));
          p[n][0] = as_float(two.x), p[n][1] = as_float(two.y);
        }
#pragma unroll
        for (int j = 0; j < kNext; j++) {
          float s = p[n][j] * of_scores;
          // tanh x = 1 - 2 / (e^2x + 1)
          if (a.softcap > 0) s = a.softcap * (1 - 2 / (exp2_approx(s / a.softcap * (2 * kLog2E)) + 1));
          if (a.slopes) s = fma_f32(slope, static_cast<float>(start + token + j - position), s);
          p[n][j] = static_cast<uint32_t>(start + token + j - begin) < seen ? s : -INFINITY;
          best = larger(best, p[n][j]);
        }
      }
      for (int mask = kOfRow / 2; mask; mask /= 2) best = larger(best, shuffle_xor(best, mask));
      best = larger(best, state.maximum);
      const float base = best == -INFINITY ? 0 : best, factor = exp2_approx((state.maximum - base) * kLog2E);
      // Sums of consecutive tokens first, however many threads a row has: its total is the same.
      float sums[kPieces];
#pragma unroll
      for (int n = 0; n < kPieces; n++) {
#pragma unroll
        for (int j = 0; j < kNext; j++) p[n][j] = exp2_approx((p[n][j] - base) * kLog2E);
        sums[n] = p[n][0] + p[n][1];
        if (kNext == 4) sums[n] += p[n][2] + p[n][3];
        for (int mask = 1; mask < kOfRow; mask *= 2) sums[n] += shuffle_xor(sums[n], mask);
      }
#pragma unroll
      for (int step = 1; step < kPieces; step *= 2) {
        for (int n = 0; n + step < kPieces; n += 2 * step) sums[n] += sums[n + step];
      }
      state.maximum = best;
      state.total = fma_f32(state.total, factor, sums[0]);
      if (thread() % kOfRow == 0) room.factors[row] = factor;

      MEMLM_SYNC_WARP();  // the row's scores are read
      if constexpr (K::kCoded) {
        for (int of = 0; of < groups; of++) {
          float x[kPieces][4];
          uint32_t most = 0;
#pragma unroll
          for (int n = 0; n < kPieces; n++) {
            const int token = (n ^ turned) * kOfRow * 4 + thread() % kOfRow * 4;
            const Vec2 four = load<Vec2>(all_value_scales + (turn * groups + of) * kStage + token);
            const float scales[4] = {low<f16>(four.x), high<f16>(four.x), low<f16>(four.y),
                                     high<f16>(four.y)};
            for (int j = 0; j < 4; j++) {
              // The scales of tokens that are not there may be NaN.
              x[n][j] = p[n][j] != 0 ? p[n][j] * scales[j] : 0;
              most = largest(most, x[n][j]);
            }
          }
          for (int mask = kOfRow / 2; mask; mask /= 2) {
            const uint32_t other = shuffle_xor(most, mask);
            most = other > most ? other : most;
          }
          const float per_step = most ? kMostDigits / as_float(most) : 0;
#pragma unroll
          for (int n = 0; n < kPieces; n++) {
            const int token = (n ^ turned) * kOfRow * 4 + thread() % kOfRow * 4;
            const Vec2 both = digits(x[n], per_step);
            uint32_t* const to = reinterpret_cast<uint32_t*>(line) + of * 32 + token / 8 * 4 + token / 4 % 2;
            // Of two rows, a half of 32 banks apart, one stores its low digits first.
            to[odd] = row % 2 ? both.y : both.x;
            to[odd ^ 2] = row % 2 ? both.x : both.y;
          }
          if (thread() % kOfRow == 0) {
            room.weight_steps[of * kRows + row] = as_float(most) * (1.f / kMostDigits / V::kUnit);
          }
        }
      } else {
#pragma unroll
        for (int n = 0; n < kPieces; n++) {
          const int token = (n ^ turned) * kOfRow * kNext + thread() % kOfRow * kNext;
          const Pairs<weight_parts> x = pairs_of<weight_parts>(p[n]);
          float* const to = line + ((token / 4) ^ other_unit) * 2 * weight_parts;
          if constexpr (kNext == 4) {
            store(to, x);
          } else {
            for (int q = 0; q < weight_parts; q++) store(to + 2 * q + token / 2 % 2, x.of[q][0]);
          }
        }
      }
    }
    wait_copies<1>();
    MEMLM_SYNC_THREADS();  // weights, factors and values are there

    float factors[columns][2];
#pragma unroll
    for (int n = 0; n < columns; n++) {
      const Vec2 two = load<Vec2>(room.factors + n * 8 + 2 * c);
      factors[n][0] = as_float(two.x), factors[n][1] = as_float(two.y);
    }
    const float* const weights = lines + g * room.pitch;
    if constexpr (K::kCoded) {
#pragma unroll
      for (int j = 0; j < tiles; j++) {
        const int tile = warp() + j * kWarps, of = tile >> (f.group == 64 ? 2 : 1);
        if (tile >= f.width / kKvTile) continue;
        int high[columns][4] = {}, low[columns][4] = {};
#pragma unroll
        for (int k0 = 0; k0 < kStage; k0 += 32) {
          uint32_t values[4];
          V::load32(all_values + tile * value_pitch, k0, values);
#pragma unroll
          for (int n = 0; n < columns; n++) {
            add_product(high[n], low[n], values,
                        load<Vec4>(weights + n * 8 * room.pitch + of * 32 + k0 / 2 + 4 * c));
          }
        }
#pragma unroll
        for (int n = 0; n < columns; n++) {
          const Vec2 two = load<Vec2>(room.weight_steps + of * kRows + n * 8 + 2 * c);
          for (int r = 0; r < 4; r++) {
            const float step = as_float(r % 2 ? two.y : two.x);
            state.sums[j][n][r] =
                fma_f32(sum_of(high[n][r], low[n][r]), step, state.sums[j][n][r] * factors[n][r % 2]);
          }
        }
      }
    } else {
#pragma unroll
      for (int n = 0; n < columns; n++) {
        for (int j = 0; j < tiles; j++) {
          for (int r = 0; r < 4; r++) state.sums[j][n][r] *= factors[n][r % 2];
        }
      }
#pragma unroll
      for (int k0 = 0; k0 < kStage; k0 += 16) {
        Pairs<weight_parts> p[columns];
#pragma unroll
        for (int n = 0; n < columns; n++) {
          const int unit = (k0 / 4 + c) ^ (g >> 1 & 1) * 4;
          p[n] = load<Pairs<weight_parts>>(weights + n * 8 * room.pitch + unit * 2 * weight_parts);
        }
#pragma unroll
        for (int j = 0; j < tiles; j++) {
          const int tile = warp() + j * kWarps;
          if (tile >= f.width / kKvTile) continue;
#pragma unroll
          for (int part = 0; part < V::kParts; part++) {
            uint32_t values[4];
            V::load16(all_values + tile * value_pitch, k0, part, values);
#pragma unroll
            for (int n = 0; n < columns; n++) {
#pragma unroll
              for (int q = 0; q < weight_parts; q++) mma<M>(state.sums[j][n], values, p[n].of[q]);
            }
          }
        }
      }
    }
  }
  if constexpr (K::kCoded) {
    // From rows 2g and 2g + 1 to g and g + 8, as floats have them.
#pragma unroll
    for (int j = 0; j < tiles; j++) {
#pragma unroll
      for (int n = 0; n < columns; n++) {
        float(&sums)[4] = state.sums[j][n];
        float moved[4];
        for (int r = 0; r < 4; r++) {
          const int from = (g / 2 + r / 2 * 4) * 4 + c;
          const float even = shuffle(sums[r % 2], from), odd = shuffle(sums[2 + r % 2], from);
          moved[r] = g % 2 ? odd : even;
        }
        for (int r = 0; r < 4; r++) sums[r] = moved[r];
      }
    }
  }
  MEMLM_SYNC_THREADS();
}

}  // namespace memlm::cuda::paged

#endif
