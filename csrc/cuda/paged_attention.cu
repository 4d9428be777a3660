// paged_attention: over keys and values in blocks, read as they are stored (csrc/kv_blocks.h).
//
// Tiles of keys have 16 tokens as rows, tiles of values 16 channels, both with k behind: each is the A
// operand of a product as it lies.  The columns of B are query rows: the query heads of one key-value head,
// times its new tokens.  So the cache is read once for all of them:
//
//     scores^T [tokens, queries]  = keys [tokens, channels] queries^T
//     out^T [channels, queries]  += values^T [channels, tokens] weights^T
//
// A block has 8 or 32 query rows of one sequence and key-value head, and goes through its tokens in stages.
// In each the tiles of keys are dealt out to warps, then, for the sums, the tiles of channels: nothing is
// read from shared memory twice, and a warp waits for others with scores and weights alone.  While one half of
// the pair is worked on the other is on its way:
//
//     copy V | scores, by tiles of tokens | copy the next K | softmax, by rows | sums, by tiles of channels
//
// Codes are multiplied as they are, as int8: unpacking them would take most of the time.  For that queries
// and weights are integers of 16 bits, in two digits of 8 that are multiplied one by one:
//
//     number = step * (256 * high + low)      step = largest / 32,639
//
//   codes    of 32 k lane (g, c) has the eight from 8c on, of rows 2g and 2g + 1: 32-bit words as they lie;
//            of 4 and 5 bits, shifted to the upper end of a byte each
//   floats   of 16 k it has the four from 4c on, of rows g and g + 8: pairs, which come out of the matrices
//            by ldmatrix.trans; f32 one by one
//
// Sequences with few new tokens are shared out along their length as well, in chunks of a size that depends
// on the longest length alone: each block stores its sums, and a second kernel adds them up in the order of
// tokens (flash-decoding).  What a sequence's result is depends on nothing else in the step.
//
// Arithmetic, of products of floats in bf16, on compute capability 7.5 in f16 (called M): sums are f32; of
// codes they are exact up to a group of channels, or of values up to a stage.
//
//     int8, int4     codes as they are.  queries, after scale and Hadamard transform, as integers with a step
//                    for each row; weights times the values' scale likewise, with a step for each row, stage
//                    of 64 tokens and group of channels
//     keys, values   bf16 as they are; f32 as the sum of two M
//     queries        of floats as they are, in two M where their dtype is another than M
//     weights        exponentials as M; with f16 as the sum of two M
//
// An int4 cache's newest block is read from its tail, as bf16, with queries in f32 as the sum of two M.
#include <math.h>

#include "kv.h"

namespace memlm::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / kWarp;
constexpr int kMostDim = 256;
constexpr int kSplitRows = 16;                       // of a sequence whose length is shared out
constexpr int kLeastChunk = 256, kMostChunks = 32;   // tokens; blocks of a sequence
constexpr float kLog2E = 1.44269504f;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
using M = f16;
#elif !defined(__CUDACC__) && MEMLM_EMULATED_ARCH < 800
using M = f16;
#else
using M = bf16;
#endif
template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

struct Attention {
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

MEMLM_DEVICE float larger(float a, float b) { return fmaxf(a, b); }  // a where b is NaN
constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

MEMLM_DEVICE int64_t part_of(const Attention& a, int sequence, int64_t row, int token, int head, int split) {
  const int64_t slot = a.slots_are_rows ? row : static_cast<int64_t>(sequence) * a.split_tokens + token;
  return (slot * a.heads + head) * a.splits + split;
}

// ---- Tiles in shared memory ----

// Of 16 rows x 32 k from k0 on, as bytes that are kUnit times what a code stands for: k 8c to 8c + 7 of rows
// 2g and 2g + 1.
struct Codes8 {
  static constexpr int kBits = 8, kStage = 64, kUnit = 1;
  static constexpr bool kCoded = true;
  // 16 bytes are 4 rows of 4 k.  Those that half a warp reads at once lie on all banks.
  MEMLM_DEVICE static int place(int piece) { return piece ^ (piece >> 3 & 3) << 1; }
  MEMLM_DEVICE static void load32(const uint8_t* tile, int k0, uint32_t (&a)[4]) {
    const int g = lane() / 4, c = lane() % 4, piece = 8 * c + g / 2;
    const uint8_t* const at = tile + k0 * kKvTile + g % 2 * 8;
    const Vec2 first = load<Vec2>(at + place(piece) * 16), second = load<Vec2>(at + place(piece + 4) * 16);
    a[0] = first.x, a[1] = first.y, a[2] = second.x, a[3] = second.y;
  }
};

// 4 bits go to the upper half of a byte, as two's complement.
struct Codes4 {
  static constexpr int kBits = 4, kUnit = 16;
  static constexpr bool kCoded = true;
  MEMLM_DEVICE static int place(int piece) { return piece ^ (piece >> 3 & 1) << 1; }  // as above
  MEMLM_DEVICE static void load32(const uint8_t* tile, int k0, uint32_t (&a)[4]) {
    const int g = lane() / 4, c = lane() % 4;
    const Vec2 codes = load<Vec2>(tile + k0 * kKvTile / 2 + g % 2 * 8 + place(4 * c + g / 2) * 16);
    constexpr uint32_t zero = 0x88888888, upper = 0xf0f0f0f0;
    a[0] = (codes.x << 4 ^ zero) & upper, a[1] = (codes.y << 4 ^ zero) & upper;
    a[2] = (codes.x ^ zero) & upper, a[3] = (codes.y ^ zero) & upper;
  }
};

// 5 bits go to the upper ones of a byte likewise.
struct Codes5 {
  static constexpr int kBits = 5, kStage = 64, kUnit = 8;
  static constexpr bool kCoded = true;
  MEMLM_DEVICE static int place(int piece) { return piece; }
  MEMLM_DEVICE static void load32(const uint8_t* tile, int k0, uint32_t (&a)[4]) {
    const int g = lane() / 4, c = lane() % 4, second = c / 2;  // lanes c and c + 2 on other banks
    const uint8_t* const run = tile + k0 * (kKvTile * 5 / 8);
    const uint8_t* const at = run + (c * kKvTile + 2 * g) * 4;
    const uint32_t one = load<uint32_t>(at + second * 4), other = load<uint32_t>(at + (1 - second) * 4);
    const uint32_t even = second ? other : one, odd = second ? one : other;
    // Nibbles of fifth bits, of rows 2g and 2g + 1: multiplied they lie 8 bits apart.
    const uint32_t fifth = run[256 + c * kKvTile + g], next = run[256 + c * kKvTile + 8 + g];
    constexpr uint32_t low = 0x10204080, high = low >> 4;
    a[0] = joined(even << 3, (fifth & 0x0f) * low), a[1] = joined(odd << 3, (fifth & 0xf0) * high);
    a[2] = joined(even >> 1, (next & 0x0f) * low), a[3] = joined(odd >> 1, (next & 0xf0) * high);
  }
  MEMLM_DEVICE static uint32_t joined(uint32_t nibbles, uint32_t fifth) {
    return (nibbles & 0x78787878) | (~fifth & 0x80808080);
  }
};

// Of 16 rows x 16 k from k0 on: k 4c to 4c + 3 of rows g and g + 8.
struct Floats16 {
  static constexpr int kBits = 16, kStage = 64, kParts = 1;
  static constexpr bool kCoded = false;
  // 16 bytes are half a k.  The eight that a matrix has, of k 0, 1, 4, 5, 8, 9, 12, 13, lie on all banks.
  MEMLM_DEVICE static int place(int piece) { return piece ^ (piece >> 3 & 1) ^ (piece >> 4 & 1) << 2; }
  MEMLM_DEVICE static void load16(const uint8_t* tile, int k0, int, uint32_t (&a)[4]) {
    const int matrix = lane() / 8, row = lane() % 8;
    const int k = row / 2 * 4 + row % 2 + matrix / 2 * 2;
    load_matrices_transposed(a, tile + place(2 * k + matrix % 2) * 16 + k0 * 32);
    if (kSame<M, f16>) {
      for (int i = 0; i < 4; i++) a[i] = pair<M>(low<bf16>(a[i]), high<bf16>(a[i]));
    }
  }
};

// A tail, in little more room than the codes before it.
struct Tail16 : Floats16 {
  static constexpr int kStage = 32;
};

// Two numbers as M, or what is left of them after that.
MEMLM_DEVICE uint32_t pair_part(float x, float y, int part) {
  const uint32_t rounded = pair<M>(x, y);
  return part == 0 ? rounded : pair<M>(x - low<M>(rounded), y - high<M>(rounded));
}

struct Floats32 {
  static constexpr int kBits = 32, kStage = 32, kParts = 2;
  static constexpr bool kCoded = false;
  MEMLM_DEVICE static int place(int piece) { return piece; }
  MEMLM_DEVICE static void load16(const uint8_t* tile, int k0, int part, uint32_t (&a)[4]) {
    const int g = lane() / 4, c = lane() % 4;
    const float* const at = reinterpret_cast<const float*>(tile) + (k0 + 4 * c) * kKvTile + g;
    for (int i = 0; i < 4; i++) {
      const float* const x = at + i / 2 * 2 * kKvTile + i % 2 * 8;
      a[i] = pair_part(x[0], x[kKvTile], part);
    }
  }
};

// ---- What tiles are multiplied by ----

// Four numbers of M, of consecutive k, as the sum of `parts` of two pairs each.
template <int parts>
struct alignas(8 * parts) Pairs {
  uint32_t of[parts][2];
};
template <int parts>
MEMLM_DEVICE Pairs<parts> pairs_of(const float (&x)[4]) {
  Pairs<parts> p;
  for (int part = 0; part < parts; part++) {
    p.of[part][0] = pair_part(x[0], x[1], part), p.of[part][1] = pair_part(x[2], x[3], part);
  }
  return p;
}

// Numbers as integers of two digits, high * 256 + low, both from -128 to 127: at most kMostDigits.
constexpr int kMostDigits = 127 * 256 + 127;
// Bits of the larger magnitude, NaN being the largest.
MEMLM_DEVICE uint32_t largest(uint32_t bits, float x) {
  const uint32_t magnitude = as_bits(x) & 0x7fffffff;
  return magnitude > bits ? magnitude : bits;
}
// Four consecutive k times `per_step`: the high digits, the low ones.
MEMLM_DEVICE Vec2 digits(const float (&x)[4], float per_step) {
  uint32_t y[4];  // its lower half: the number + 128
  for (int i = 0; i < 4; i++) y[i] = as_bits(fma_f32(x[i], per_step, 0x1.8p23f + 128));
  const uint32_t first = permute_bytes(y[0], y[1], 0x5410), second = permute_bytes(y[2], y[3], 0x5410);
  return {permute_bytes(first, second, 0x7531), permute_bytes(first, second, 0x6420) ^ 0x80808080};
}
// Of 8 consecutive k and a column: high digits, then low ones.
MEMLM_DEVICE void add_product(int (&high)[4], int (&low)[4], const uint32_t (&a)[4], const Vec4& b) {
  const uint32_t upper[2] = {b.x, b.y}, lower[2] = {b.z, b.w};
  mma_int8(high, a, upper);
  mma_int8(low, a, lower);
}
MEMLM_DEVICE float sum_of(int high, int low) { return static_cast<float>(high * 256 + low); }

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
MEMLM_DEVICE void attend(const Attention& a, const Work& w, const Room& room, const KvLayout& f,
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

// A row's numbers in a warp, up to 128 times n: lane l has number 4 (l + 32 i) + j at [i][j], 0 where there
// is none.
template <int n>
using Row = float[n][4];

// The orthonormal Walsh-Hadamard transform, in pieces of at least 32.
template <int n>
MEMLM_DEVICE void transform(Row<n>& x, int piece, float root) {
#pragma unroll
  for (float(&four)[4] : x) {
    const float a = four[0] + four[1], b = four[0] - four[1], c = four[2] + four[3], d = four[2] - four[3];
    four[0] = a + c, four[1] = b + d, four[2] = a - c, four[3] = b - d;
  }
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    if (4 * step >= piece) break;
    const float sign = lane() & step ? -1 : 1;
#pragma unroll
    for (float(&four)[4] : x) {
      for (float& one : four) one = fma_f32(one, sign, shuffle_xor(one, step));
    }
  }
  for (int j = 0; j < 4; j++) {
    const float sum = x[0][j] + x[n - 1][j], difference = x[0][j] - x[n - 1][j];
    if (n == 2 && piece == 8 * kWarp) x[0][j] = sum, x[n - 1][j] = difference;
    for (int i = 0; i < n; i++) x[i][j] *= root;
  }
}

// x plus the numbers [width] at `from`, in shared memory, times factor.
template <int n>
MEMLM_DEVICE void add_row(Row<n>& x, const float* from, float factor, int width) {
#pragma unroll
  for (int i = 0; i < n; i++) {
    const int first = 4 * (lane() + i * kWarp);
    if (first >= width) continue;
    const Vec4 four = load<Vec4>(from + first);
    const float its[4] = {as_float(four.x), as_float(four.y), as_float(four.z), as_float(four.w)};
    for (int j = 0; j < 4; j++) x[i][j] = fma_f32(its[j], factor, x[i][j]);
  }
}

// A row's sums, transformed back, times factor: to out.
template <class T, int n>
MEMLM_DEVICE void finish(const Attention& a, Row<n>& x, float factor, int64_t row, int head) {
  const KvLayout& f = a.cache.layout;
  if (a.cache.piece > 1) transform<n>(x, a.cache.piece, a.cache.root);
  T* const to = static_cast<T*>(a.out) + row * a.out_stride + static_cast<int64_t>(head) * f.dim;
#pragma unroll
  for (int i = 0; i < n; i++) {
    for (int j = 0; j < 4; j++) {
      const int d = 4 * (lane() + i * kWarp) + j;
      if (d < f.dim) to[d] = from_float<T>(x[i][j] * factor);
    }
  }
}

// What the weights' sum becomes with a sink, relative to the larger of both, and the factor of what was
// relative to `maximum`.
MEMLM_DEVICE float normaliser(const Attention& a, int head, float maximum, float total) {
  if (!a.sinks) return 1 / total;
  const float sink = a.sinks[head], base = sink > maximum ? sink : maximum;
  const float factor = exp2_approx((maximum - base) * kLog2E);
  return factor / fma_f32(total, factor, exp2_approx((sink - base) * kLog2E));
}

// Of queries in M; int8 has none.
template <class T, memlm_kv_type type>
constexpr int kQueryParts = type == MEMLM_KV_INT8 ? 0 : kSame<T, M> && type <= MEMLM_KV_BF16 ? 1 : 2;

// Queries into shared memory: as digits, and as the sum of `parts`.
template <class T, int parts, bool coded, int rows, int n>
MEMLM_DEVICE void load_queries(const Attention& a, const Work& w, const Room& room) {
  const KvLayout& f = a.cache.layout;
  for (int row = warp(); row < rows; row += kWarps) {
    const int i = w.first + row;
    Row<n> x = {};
    if (row < w.rows) {
      const T* const from = static_cast<const T*>(a.q) + (w.first_row + i / a.group) * a.q_stride +
                            static_cast<int64_t>(w.kv_head * a.group + i % a.group) * f.dim;
      for (int k = 0; k < n; k++) {
        for (int j = 0; j < 4; j++) {
          const int d = 4 * (lane() + k * kWarp) + j;
          if (d < f.dim) x[k][j] = coded ? to_float(from[d]) * a.scale : to_float(from[d]);
        }
      }
      if (coded) transform<n>(x, a.cache.piece, a.cache.root);
    }
    float per_step = 0;
    if constexpr (coded) {
      uint32_t most = 0;
      for (const auto& four : x) {
        for (const float one : four) most = largest(most, one);
      }
      for (int mask = kWarp / 2; mask; mask /= 2) {
        const uint32_t other = shuffle_xor(most, mask);
        most = other > most ? other : most;
      }
      per_step = most ? kMostDigits / as_float(most) : 0;
      if (lane() == 0) room.steps[row] = as_float(most) * (1.f / kMostDigits);
    }
    for (int k = 0; k < n; k++) {
      const int unit = lane() + k * kWarp;  // of four channels
      if (4 * unit >= f.width) continue;
      if constexpr (coded) {
        const int at = (unit / 8 * (rows / 8) + row / 8) * kWarp + row % 8 * 4 + unit % 8 / 2;
        uint32_t* const to = reinterpret_cast<uint32_t*>(room.codes + at) + unit % 2;
        const Vec2 both = digits(x[k], per_step);
        to[0] = both.x, to[2] = both.y;
      }
      if constexpr (parts > 0) {
        const int at = (unit / 4 * (rows / 8) + row / 8) * kWarp + row % 8 * 4 + unit % 4;
        store(room.pairs + at * sizeof(Pairs<parts>), pairs_of<parts>(x[k]));
      }
    }
  }
}

template <class T, memlm_kv_type type, int columns, int tiles>
__global__ void __launch_bounds__(kThreads, columns > 1 ? (tiles == 2 ? 3 : 2) : tiles == 2 ? 5 : 4)
    paged_attention_kernel(const Attention a) {
  constexpr int kRows = 8 * columns, kOfRow = kThreads / kRows;
  constexpr int kParts = kQueryParts<T, type>, kWeightParts = kSame<T, f16> ? 2 : 1;
  constexpr bool kCoded = type >= MEMLM_KV_INT8;
  const KvCache& cache = a.cache;
  const KvLayout& f = cache.layout;
  const Deal deal = {a.group, kRows, 1};
  const int sequence = sequence_of(cache.rows, cache.sequences, deal, block_x());
  const int64_t first_row = cache.rows[sequence], count = cache.rows[sequence + 1] - first_row;
  const int64_t first = (block_x() - first_item(cache.rows, sequence, deal)) * kRows;
  const int length = static_cast<int>(cache.lengths[sequence]);
  if (first >= count * a.group) return;
  const Work w = {sequence, block_y(), static_cast<int>(least(kRows, count * a.group - first)), first_row,
                  length - static_cast<int>(count), static_cast<int>(first), kCoded ? 1 : a.scale};
  // What its queries see.
  const int position = w.before + w.first / a.group;
  int lo = a.window && position >= a.window ? position - a.window + 1 : 0;
  int hi = w.before + (w.first + w.rows - 1) / a.group + 1;
  const bool is_split = a.splits > 1 && count <= a.split_tokens;
  if (is_split) {
    lo = static_cast<int>(most(lo, static_cast<int64_t>(block_z()) * a.chunk));
    hi = static_cast<int>(least(hi, (block_z() + int64_t{1}) * a.chunk));
  }
  if (is_split ? lo >= hi : block_z() > 0) return;

  uint8_t* const stage = shared<uint8_t>();
  Room room;
  room.stage = stage;
  room.codes = reinterpret_cast<Vec4*>(stage + a.stage_bytes);
  room.pairs = stage + a.stage_bytes + (kCoded ? kRows * f.width * 2 : 0);
  room.lines = reinterpret_cast<float*>(room.pairs + kParts * kRows * f.width * 2);
  room.pitch = a.pitch;
  room.factors = room.lines + lines_of(kRows) * kRows * a.pitch;
  room.weight_steps = room.factors + kRows;
  room.steps = room.weight_steps + (kCoded ? f.groups : 0) * kRows;
  // Rows that there are not have weights and factors as well.
  for (float* i = room.lines + thread(); i < room.steps; i += kThreads) *i = 0;
  const auto queries = [&] { load_queries<T, kParts, kCoded, kRows, tiles / 2>(a, w, room); };

  State<columns, tiles> state = {};
  state.maximum = -INFINITY;
  if constexpr (type == MEMLM_KV_F32) {
    attend<Floats32, Floats32, kParts, kWeightParts>(a, w, room, f, nullptr, lo, hi, state, queries);
  } else if constexpr (type == MEMLM_KV_BF16) {
    attend<Floats16, Floats16, kParts, kWeightParts>(a, w, room, f, nullptr, lo, hi, state, queries);
  } else if constexpr (type == MEMLM_KV_INT8) {
    attend<Codes8, Codes8, 1, 1>(a, w, room, f, nullptr, lo, hi, state, queries);
  } else {
    const int newest = (length - 1) / f.tokens * f.tokens;
    if (lo < newest) {
      const int end = static_cast<int>(least(hi, newest));
      attend<Codes5, Codes4, 1, 1>(a, w, room, f, nullptr, lo, end, state, queries);
    }
    if (hi > newest) {
      const uint8_t* const tail = tail_of(cache, sequence, w.kv_head);
      const int begin = static_cast<int>(most(lo, newest));
      attend<Tail16, Tail16, kParts, kWeightParts>(a, w, room, cache.tail, tail, begin, hi, state, [&] {
        if (lo >= newest) queries();
      });
    }
  }

  float* const sums = reinterpret_cast<float*>(stage);
  const int pitch = f.width + 4, g = lane() / 4, c = lane() % 4;
#pragma unroll
  for (int j = 0; j < tiles; j++) {
    const int tile = warp() + j * kWarps;
    if (tile >= f.width / kKvTile) continue;
#pragma unroll
    for (int n = 0; n < columns; n++) {
      for (int r = 0; r < 4; r++) {
        sums[(n * 8 + 2 * c + r % 2) * pitch + tile * kKvTile + g + r / 2 * 8] = state.sums[j][n][r];
      }
    }
  }
  const int row = thread() / kOfRow, token = (w.first + row) / a.group;
  const int head = w.kv_head * a.group + (w.first + row) % a.group;
  if (row < w.rows && thread() % kOfRow == 0) {
    if (is_split) {
      const int64_t part = part_of(a, sequence, first_row + token, token, head, block_z());
      store(a.totals + 2 * part, Vec2{as_bits(state.maximum), as_bits(state.total)});
    } else {
      room.factors[row] = normaliser(a, head, state.maximum, state.total);
    }
  }
  MEMLM_SYNC_THREADS();
  for (int one = warp(); one < w.rows; one += kWarps) {
    const int its_token = (w.first + one) / a.group;
    const int its_head = w.kv_head * a.group + (w.first + one) % a.group;
    const int64_t its_row = first_row + its_token;
    if (is_split) {
      float* const to = a.sums + part_of(a, sequence, its_row, its_token, its_head, block_z()) * f.width;
      for (int i = lane(); i < f.width; i += kWarp) to[i] = sums[one * pitch + i];
    } else {
      Row<tiles / 2> x = {};
      add_row<tiles / 2>(x, sums + one * pitch, 1, f.width);
      finish<T, tiles / 2>(a, x, room.factors[one], its_row, its_head);
    }
  }
}

// The results of sequences that are shared out: a block for each row and head.
template <class T>
__global__ void __launch_bounds__(kThreads) combine_kernel(const Attention a) {
  const KvCache& cache = a.cache;
  const int width = cache.layout.width, row = block_x(), head = block_y();
  const int sequence = sequence_of(cache.rows, cache.sequences, {1, 1, 0}, row);
  const int64_t first_row = cache.rows[sequence], count = cache.rows[sequence + 1] - first_row;
  if (row >= first_row + count || count > a.split_tokens) return;
  const int token = static_cast<int>(row - first_row);
  const int position = static_cast<int>(cache.lengths[sequence] - count) + token;
  const int lo = a.window && position >= a.window ? position - a.window + 1 : 0;
  const int begin = lo / a.chunk, end = position / a.chunk + 1;
  const int64_t part = part_of(a, sequence, row, token, head, 0);
  // Of maxima and totals a lane has one each, of sums all are asked for at once.
  const bool has = lane() >= begin && lane() < end;
  const Vec2 mine = has ? load<Vec2>(a.totals + 2 * (part + lane())) : Vec2{as_bits(-INFINITY), 0};
  float* const sums = shared<float>();
  const float* const from = a.sums + (part + begin) * width;
  for (int i = thread(); i < (end - begin) * width / 4; i += kThreads) copy_async(sums + 4 * i, from + 4 * i);
  commit_copies();
  float maximum = as_float(mine.x);
  for (int mask = kWarp / 2; mask; mask /= 2) maximum = larger(maximum, shuffle_xor(maximum, mask));
  const float factor = has ? exp2_approx((as_float(mine.x) - maximum) * kLog2E) : 0;
  float total = as_float(mine.y) * factor;
  for (int mask = kWarp / 2; mask; mask /= 2) total += shuffle_xor(total, mask);
  wait_copies<0>();
  MEMLM_SYNC_THREADS();
  if (warp() > 0) return;
  Row<2> x = {};
#pragma unroll 4
  for (int i = begin; i < end; i++) add_row<2>(x, sums + (i - begin) * width, shuffle(factor, i), width);
  finish<T, 2>(a, x, normaliser(a, head, maximum, total), row, head);
}

// ---- The host's side ----

using Kernel = void (*)(Attention);
template <class T, memlm_kv_type type>
Kernel kernel_of(int rows, bool wide) {
  if (rows == 8)
    return wide ? &paged_attention_kernel<T, type, 1, 4> : &paged_attention_kernel<T, type, 1, 2>;
  return wide ? &paged_attention_kernel<T, type, 4, 4> : &paged_attention_kernel<T, type, 4, 2>;
}
template <class T>
Kernel kernel_of(memlm_kv_type type, int rows, bool wide) {
  switch (type) {
    case MEMLM_KV_F32: return kernel_of<T, MEMLM_KV_F32>(rows, wide);
    case MEMLM_KV_BF16: return kernel_of<T, MEMLM_KV_BF16>(rows, wide);
    case MEMLM_KV_INT8: return kernel_of<T, MEMLM_KV_INT8>(rows, wide);
    default: return kernel_of<T, MEMLM_KV_INT4>(rows, wide);
  }
}

template <class K, class V>
int stage_bytes(const KvLayout& f) {
  const int codes =
      K::kStage * (static_cast<int>(round_up(f.channels, 16)) * K::kBits + f.width * V::kBits) / 8;
  return codes + (K::kCoded ? K::kStage * f.groups * 6 : 0);
}
int stage_bytes(memlm_kv_type type, const KvCache& c) {
  switch (type) {
    case MEMLM_KV_F32: return stage_bytes<Floats32, Floats32>(c.layout);
    case MEMLM_KV_BF16: return stage_bytes<Floats16, Floats16>(c.layout);
    case MEMLM_KV_INT8: return stage_bytes<Codes8, Codes8>(c.layout);
    default:
      return static_cast<int>(
          most(stage_bytes<Codes5, Codes4>(c.layout), stage_bytes<Tail16, Tail16>(c.tail)));
  }
}

template <class T>
memlm_status begin(const Gpu& gpu, memlm_kv_type type, int64_t rows, Attention& a, void* stream) {
  const int width = a.cache.layout.width, stage = stage_bytes(type, a.cache);
  const bool coded = type >= MEMLM_KV_INT8, exact = kSame<T, bf16> || gpu.arch < 800;
  const int parts = type == MEMLM_KV_INT8 ? 0 : coded || !exact ? 2 : 1;  // as kQueryParts
  const int groups = coded ? a.cache.layout.groups : 0;
  a.pitch = static_cast<int>(most(64, 32 * groups)) + 16;
  int tile = rows * a.group > 8 * static_cast<int64_t>(a.cache.sequences) ? 32 : 8, bytes;
  for (;; tile = 8) {
    a.stage_bytes = static_cast<int>(most(stage, tile * (width + 4) * 4));
    bytes = a.stage_bytes + tile * ((parts + coded) * width * 2 + (lines_of(tile) * a.pitch + 2 + groups) * 4);
    if (bytes <= gpu.shared_bytes) break;
    if (tile == 8) {
      return fail(MEMLM_UNSUPPORTED, "pool: head_dim = %d needs %d bytes of shared memory, the device has %d",
                  a.cache.layout.dim, bytes, gpu.shared_bytes);
    }
  }
  const Grid grid = {items(rows, a.cache.sequences, {a.group, tile, 1}), a.heads / a.group, a.splits};
  MEMLM_PASS(started(launch(kernel_of<T>(type, tile, width > 128), grid, kThreads, bytes, stream, a)));
  if (a.splits == 1) return MEMLM_OK;
  return started(
      launch(&combine_kernel<T>, {rows, a.heads}, kThreads, a.splits * width * 4, stream, a));
}

}  // namespace
}  // namespace memlm::cuda

using namespace memlm;
using namespace memlm::cuda;

memlm_status memlm_cuda_paged_attention(const memlm_kv_pool* pool, const memlm_sequences* sequences,
                                        const memlm_paged_attention_args* args,
                                        const memlm_cuda_bounds* bounds, memlm_cuda_queue* queue) {
  Gpu gpu;
  MEMLM_PASS(find_gpu(args->dtype, &gpu));
  Attention a = {};
  MEMLM_PASS(kv_cache(pool, sequences, &a.cache));
  MEMLM_PASS(check_bounds(bounds));
  const KvLayout& f = a.cache.layout;
  MEMLM_CHECK(f.dim <= kMostDim, "pool: got head_dim = %d, accepted is 1 to %d", f.dim, kMostDim);
  MEMLM_CHECK(args->heads >= 1 && args->heads % pool->kv_heads == 0 && args->heads <= INT32_MAX,
              "heads: got %lld, expected a multiple of the pool's %lld", static_cast<long long>(args->heads),
              static_cast<long long>(pool->kv_heads));
  MEMLM_CHECK(isfinite(args->scale), "scale: got %g, expected a finite number", args->scale);
  MEMLM_CHECK(args->window >= 0, "window: got %lld, accepted is 0 (none) or above",
              static_cast<long long>(args->window));
  MEMLM_CHECK(args->softcap >= 0 && isfinite(args->softcap), "softcap: got %g, accepted is 0 (none) or above",
              args->softcap);
  if (!sequences->count || !bounds->rows) return MEMLM_OK;
  MEMLM_CHECK(args->q && args->out && is_aligned(args->q, 2) && is_aligned(args->out, 2),
              "q, out: NULL, or not aligned to an element");
  MEMLM_CHECK(args->q_stride >= args->heads * f.dim && args->out_stride >= args->heads * f.dim,
              "q_stride, out_stride: at least heads * head_dim = %lld are needed",
              static_cast<long long>(args->heads * f.dim));
  a.q = args->q, a.out = args->out, a.q_stride = args->q_stride, a.out_stride = args->out_stride;
  a.window = static_cast<int>(least(args->window, INT32_MAX));
  a.scale = args->scale, a.softcap = args->softcap;
  a.slopes = args->slopes, a.sinks = args->sinks;
  a.heads = static_cast<int>(args->heads), a.group = static_cast<int>(args->heads / pool->kv_heads);

  const int64_t longest = bounds->longest ? bounds->longest : sequences->table_stride * f.tokens;
  MEMLM_CHECK(longest <= INT32_MAX, "sequences: got room for %lld tokens in one, accepted is up to %d",
              static_cast<long long>(longest), INT32_MAX);
  a.chunk = static_cast<int>(most(kLeastChunk, round_up(ceil_div(longest, kMostChunks), kLeastChunk)));
  a.splits = static_cast<int>(most(1, ceil_div(longest, a.chunk)));
  a.split_tokens = static_cast<int>(most(1, kSplitRows / a.group));
  a.slots_are_rows = bounds->rows <= sequences->count * a.split_tokens;
  if (a.splits > 1) {
    const int64_t slots = a.slots_are_rows ? bounds->rows : sequences->count * a.split_tokens;
    const int64_t parts = slots * a.heads * a.splits;
    MEMLM_PASS(need(queue, parts * (f.width + 2) * 4));
    a.sums = static_cast<float*>(queue->workspace);
    a.totals = a.sums + parts * f.width;
  }
  return args->dtype == MEMLM_F16 ? begin<f16>(gpu, pool->type, bounds->rows, a, queue->stream)
                                  : begin<bf16>(gpu, pool->type, bounds->rows, a, queue->stream);
}
