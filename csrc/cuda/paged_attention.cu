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
// read from shared memory twice.  While one half of the pair is worked on the other is on its way:
//
//     copy V | scores, by tiles of tokens | copy the next K | softmax, by rows | sums, by tiles of channels
//
//   of 16 k lane (g, c) has the four k from 4c on, of rows g and g + 8:
//   codes    a 32-bit word for each row; of 4 bits the half of one
//   floats   pairs come out of the matrices by ldmatrix.trans; f32 one by one
//
// Sequences with few new tokens are shared out along their length as well, in chunks of a size that depends
// on the longest length alone: each block stores its sums, and a second kernel adds them up in the order of
// tokens (flash-decoding).  What a sequence's result is depends on nothing else in the step.
//
// Arithmetic, of products in bf16, on compute capability 7.5 in f16 (called M): sums are f32.
//
//     keys, values   codes and bf16 as they are; f32 as the sum of two M
//     queries        f32 after scale and Hadamard transform for int8 and int4, then as the sum of two M; of
//                    floats as they are, in two M where their dtype is another than M
//     weights        exponentials, times the values' scale, as M; with f16 as the sum of two M
//
// An int4 cache's newest block is read from its tail, as bf16.
#include <math.h>

#include "kv.h"

namespace memlm::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / kWarp;
constexpr int kMostDim = 256;
constexpr int kSplitRows = 16;                       // of a sequence whose length is shared out
constexpr int kLeastChunk = 256, kMostChunks = 32;   // tokens; blocks of a sequence
constexpr int kWeightsPitch = 64 + 16;  // for the longest stage
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
  int64_t q_stride, out_stride, window;
  int heads, group;
  float scale, softcap;
  const float *slopes, *sinks;
  int query_pitch;           // elements from one row to the next in shared memory
  int stage_bytes;  // that a stage, and at last the sums, take of shared memory
  // Of sequences with at most split_tokens new tokens, each chunk's sums [width], maximum and total, for
  // each slot and head.  A slot is a row, or where those would be more: split_tokens of each sequence.
  int splits, split_tokens;
  int64_t chunk;
  bool slots_are_rows;
  float *sums, *totals;
};

MEMLM_DEVICE float larger(float a, float b) { return b > a ? b : a; }  // a where b is NaN
constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

MEMLM_DEVICE int64_t part_of(const Attention& a, int sequence, int64_t row, int token, int head, int split) {
  const int64_t slot = a.slots_are_rows ? row : static_cast<int64_t>(sequence) * a.split_tokens + token;
  return (slot * a.heads + head) * a.splits + split;
}

// ---- Tiles in shared memory: 16 rows x 16 k from k0 on ----

// Four codes, one a byte, to pairs of M: 2^n beside them, less 2^n and the zero.
MEMLM_DEVICE void pairs_of(uint32_t codes, uint32_t minus, uint32_t (&to)[2]) {
  constexpr uint32_t magic = kSame<M, f16> ? 0x64646464 : 0x43434343;
  constexpr uint32_t ones = kSame<M, f16> ? 0x3c003c00 : 0x3f803f80;
  constexpr uint32_t above = kSame<M, f16> ? 0xe4e4e4e4 : 0xc3c3c3c3;
  to[0] = fma_pair<M>(permute_bytes(codes, magic, 0x4140), ones, permute_bytes(minus, above, 0x4140));
  to[1] = fma_pair<M>(permute_bytes(codes, magic, 0x4342), ones, permute_bytes(minus, above, 0x4342));
}

struct Codes8 {
  static constexpr int kBits = 8, kStage = 64, kParts = 1;
  static constexpr bool kCoded = true;
  MEMLM_DEVICE static int place(int piece) { return piece; }
  MEMLM_DEVICE static void load16(const uint8_t* tile, int k0, int, uint32_t (&a)[4]) {
    const int g = lane() / 4, c = lane() % 4, first = c / 2 * 8;  // lanes c and c + 2 on other banks
    const uint8_t* const at = tile + ((k0 / 4 + c) * kKvTile + g) * 4;
    const uint32_t one = load<uint32_t>(at + first * 4), other = load<uint32_t>(at + (8 - first) * 4);
    const uint32_t upper = first ? other : one, lower = first ? one : other;
    uint32_t pairs[2];
    pairs_of(upper & 0x7f7f7f7f, upper & 0x80808080, pairs);
    a[0] = pairs[0], a[2] = pairs[1];
    pairs_of(lower & 0x7f7f7f7f, lower & 0x80808080, pairs);
    a[1] = pairs[0], a[3] = pairs[1];
  }
};

// 4 bits, or 5.
template <int bits>
struct Nibbles {
  static constexpr int kBits = bits, kParts = 1;
  [[maybe_unused]] static constexpr int kStage = 64;
  static constexpr bool kCoded = true;
  MEMLM_DEVICE static int place(int piece) { return piece; }
  MEMLM_DEVICE static void load16(const uint8_t* tile, int k0, int, uint32_t (&a)[4]) {
    const int g = lane() / 4, c = lane() % 4;
    const uint8_t* const run = tile + k0 / 32 * (64 * bits);
    for (int half = 0; half < 2; half++) {
      const int row = g + 8 * half, k = k0 % 32 / 4 + c;
      uint32_t codes = load<uint32_t>(run + (k / 2 * kKvTile + row) * 4) >> c % 2 * 4 & 0x0f0f0f0f;
      if (bits == 5) {
        const uint32_t fifth = run[256 + (k * kKvTile + row) / 2] >> row % 2 * 4 & 15;
        codes |= (fifth * 0x00204081 & 0x01010101) << 4;
      }
      uint32_t pairs[2];
      pairs_of(codes, bits == 5 ? 0x10101010 : 0x08080808, pairs);
      a[half] = pairs[0], a[half + 2] = pairs[1];
    }
  }
};

struct Floats16 {
  static constexpr int kBits = 16, kStage = 64, kParts = 1;
  static constexpr bool kCoded = false;
  // 16 bytes are half a k.  The eight that a matrix has, of k 0, 1, 4, 5, 8, 9, 12, 13, lie on all banks.
  MEMLM_DEVICE static int place(int piece) { return piece ^ (piece >> 3 & 1) ^ (piece >> 4 & 1) << 2; }
  MEMLM_DEVICE static void load16(const uint8_t* tile, int k0, int, uint32_t (&a)[4]) {
    const int matrix = lane() / 8, row = lane() % 8;
    const int k = k0 + row / 2 * 4 + row % 2 + matrix / 2 * 2;
    load_matrices_transposed(a, tile + place(2 * k + matrix % 2) * 16);
    if (kSame<M, f16>) {
      for (int i = 0; i < 4; i++) a[i] = pair<M>(low<bf16>(a[i]), high<bf16>(a[i]));
    }
  }
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

// ---- The work of a block ----

// Where a row's weight of a token of the stage lies: on other banks than what is read or written with it.
MEMLM_DEVICE int place_of(int row, int token) { return row * kWeightsPitch + (token ^ (row >> 1 & 3) * 8); }

template <int columns, int tiles>  // tiles of 8 query rows; of 16 channels, for each warp
struct State {
  float sums[tiles][columns][4];
  float maximum, total;  // of the row that the thread does the softmax of
};

struct Work {
  int sequence, kv_head, rows;
  int64_t first_row, before;  // of the first new token, and how many tokens lie before it
  int first;                  // of the sequence's query rows
  float factor;               // of scores
};

struct Room {
  uint8_t *keys, *values;
  uint16_t *key_scales, *value_scales;
  M* queries;      // [parts][rows][query_pitch]
  float* weights;  // of each row and token, where place_of says: scores first
  float* factors;  // [rows]
};

// All tokens from lo to hi - 1: into `state`.
template <class K, class V, int query_parts, int weight_parts, int columns, int tiles>
MEMLM_DEVICE void attend(const Attention& a, const Work& w, Room room, const KvLayout& f,
                         const uint8_t* tail, int64_t lo, int64_t hi, State<columns, tiles>& state) {
  constexpr int kStage = K::kStage, kRows = 8 * columns, kOfRow = kThreads / kRows;
  constexpr int kRun = kActGroup;  // tokens that lie in one block
  const int key_pitch = (f.channels + 15) / 16 * 2 * kKvTile * K::kBits, value_pitch = kStage * 2 * V::kBits;
  const int group = K::kCoded ? f.group : (f.channels + 15) / 16 * 16, g = lane() / 4, c = lane() % 4;

  room.keys = shared<uint8_t>();
  room.values = room.keys + kStage / kKvTile * key_pitch;
  room.key_scales = reinterpret_cast<uint16_t*>(room.values + f.width / kKvTile * value_pitch);
  room.value_scales = room.key_scales + kStage * f.groups;

  const auto block = [&](int64_t t) {
    return tail ? tail : block_of(a.cache, w.sequence, w.kv_head, t);
  };
  const auto is_there = [&](int64_t run) { return run < hi && run + kRun > lo; };
  // Of a stage from token `start` on: the keys of the warp's tile, and their scales.
  const auto copy_keys = [&](int64_t start) {
    const int64_t t = start + warp() * kKvTile;
    if (warp() >= kStage / kKvTile) return;
    const bool valid = is_there(t / kRun * kRun);
    const uint8_t* const from = valid ? block(t) : a.cache.blocks;
    const int place = static_cast<int>(t % f.tokens) / kKvTile;
    uint8_t* const to = room.keys + warp() * key_pitch;
    for (int i = lane(); i < f.key_tile / 16; i += kWarp) {
      copy_async(to + K::place(i) * 16, valid ? from + place * f.key_tile + i * 16 : from, valid);
    }
    for (int i = lane(); K::kCoded && i < 2 * f.groups; i += kWarp) {
      copy_async(room.key_scales + (warp() * 2 * f.groups + i) * 8,
                 valid ? from + f.key_scales + (place * 2 * f.groups + i) * 16 : from, valid);
    }
  };
  // The values of the warp's channels; scales by all.  What is not there becomes 0: it may be NaN.
  const auto copy_values = [&](int64_t start) {
    constexpr int kPieces = kRun * 2 * V::kBits / 16, kOfToken = V::kCoded ? kPieces : kPieces / kRun;
    for (int run = 0; run < kStage / kRun; run++) {
      const int64_t t = start + run * kRun;
      const bool valid = is_there(t);
      const uint8_t* const from = valid ? block(t) : a.cache.blocks;
      const int place = static_cast<int>(t % f.tokens);
      for (int tile = warp(); tile < f.width / kKvTile; tile += kWarps) {
        const uint8_t* const at = from + f.values + tile * f.value_tile + place * 2 * V::kBits;
        for (int i = lane(); i < kPieces; i += kWarp) {
          const int64_t token = t + i / kOfToken;
          const bool copied = V::kCoded ? valid : valid && token < hi;
          copy_async(room.values + tile * value_pitch + V::place(run * kPieces + i) * 16,
                     valid ? at + i * 16 : from, copied);
        }
      }
      for (int i = thread(); V::kCoded && i < 4 * f.groups; i += kThreads) {
        copy_async(room.value_scales + i / 4 * kStage + run * kRun + i % 4 * 8,
                   valid ? from + f.value_scales + (i / 4 * f.tokens + place) * 2 + i % 4 * 16 : from, valid);
      }
    }
  };

  // Channels that the keys do not have, up to a multiple of 16.
  for (int i = f.key_tile / 16 + lane(); warp() < kStage / kKvTile && i < key_pitch / 16; i += kWarp) {
    store(room.keys + warp() * key_pitch + K::place(i) * 16, Vec4{0, 0, 0, 0});
  }

  // The thread's row of the softmax.
  const int row = thread() / kOfRow, i = w.first + row;
  const int64_t position = w.before + i / a.group;
  const int64_t row_end = row < w.rows ? position + 1 : 0;
  const int64_t row_begin = a.window && position >= a.window ? position - a.window + 1 : 0;
  const float slope = a.slopes ? a.slopes[w.kv_head * a.group + i % a.group] : 0;

  const int64_t begin = lo / kStage * kStage;
  copy_keys(begin);
  commit_copies();
  for (int64_t start = begin; start < hi; start += kStage) {
    wait_copies<0>();
    MEMLM_SYNC_THREADS();  // the keys are there, and the last stage's values not needed any more
    copy_values(start);
    commit_copies();

    if (warp() < kStage / kKvTile) {
      const uint8_t* const tile = room.keys + warp() * key_pitch;
      float scores[columns][4] = {};
      for (int of = 0; of * group < f.channels; of++) {
        float sums[columns][4] = {};
        for (int k0 = of * group; k0 < (of + 1) * group; k0 += 16) {
#pragma unroll
          for (int part = 0; part < K::kParts; part++) {
            uint32_t keys[4];
            K::load16(tile, k0, part, keys);
#pragma unroll
            for (int n = 0; n < columns; n++) {
#pragma unroll
              for (int q = 0; q < query_parts; q++) {
                const int at = (q * kRows + n * 8 + g) * a.query_pitch + k0 + 4 * c;
                const Vec2 x = load<Vec2>(room.queries + at);
                const uint32_t b[2] = {x.x, x.y};
                mma<M>(sums[n], keys, b);
              }
            }
          }
        }
        float scales[2] = {1, 1};
        if (K::kCoded) {
          const uint16_t* const at = room.key_scales + (warp() * f.groups + of) * kKvTile + g;
          scales[0] = to_float(f16{at[0]}), scales[1] = to_float(f16{at[8]});
        }
#pragma unroll
        for (int n = 0; n < columns; n++) {
          for (int j = 0; j < 4; j++) scores[n][j] = fma_f32(sums[n][j], scales[j / 2], scores[n][j]);
        }
      }
#pragma unroll
      for (int n = 0; n < columns; n++) {
        for (int j = 0; j < 4; j++) {
          room.weights[place_of(n * 8 + 2 * c + j % 2, warp() * kKvTile + g + j / 2 * 8)] = scores[n][j];
        }
      }
    }
    MEMLM_SYNC_THREADS();  // the scores are there, and the keys not needed any more
    if (start + kStage < hi) copy_keys(start + kStage);
    commit_copies();

    {
      float mine[kStage / kOfRow], best = state.maximum;
#pragma unroll
      for (int j = 0; j < kStage / kOfRow; j++) {
        const int of_stage = thread() % kOfRow + j * kOfRow;
        const int64_t t = start + of_stage;
        float s = room.weights[place_of(row, of_stage)] * w.factor;
        // tanh x = 1 - 2 / (e^2x + 1)
        if (a.softcap > 0) s = a.softcap * (1 - 2 / (exp2_approx(s / a.softcap * (2 * kLog2E)) + 1));
        if (a.slopes) s = fma_f32(slope, static_cast<float>(t - position), s);
        mine[j] = t >= row_begin && t < row_end && t >= lo && t < hi ? s : -INFINITY;
        best = larger(best, mine[j]);
      }
      for (int mask = kOfRow / 2; mask; mask /= 2) best = larger(best, shuffle_xor(best, mask));
      const float base = best == -INFINITY ? 0 : best, factor = exp2_approx((state.maximum - base) * kLog2E);
      float sum = 0;
#pragma unroll
      for (int j = 0; j < kStage / kOfRow; j++) {
        const float p = exp2_approx((mine[j] - base) * kLog2E);
        room.weights[place_of(row, thread() % kOfRow + j * kOfRow)] = p;
        sum += p;
      }
      for (int mask = kOfRow / 2; mask; mask /= 2) sum += shuffle_xor(sum, mask);
      state.maximum = best;
      state.total = fma_f32(state.total, factor, sum);
      if (thread() % kOfRow == 0) room.factors[row] = factor;
    }
    wait_copies<1>();
    MEMLM_SYNC_THREADS();  // weights, factors and values are there

#pragma unroll
    for (int n = 0; n < columns; n++) {
      const float even = room.factors[n * 8 + 2 * c], odd = room.factors[n * 8 + 2 * c + 1];
#pragma unroll
      for (int j = 0; j < tiles; j++) {
        for (int r = 0; r < 4; r++) state.sums[j][n][r] *= r % 2 ? odd : even;
      }
    }
#pragma unroll
    for (int j = 0; j < tiles; j++) {
      const int tile = warp() + j * kWarps;
      if (tile >= f.width / kKvTile) continue;
      for (int k0 = 0; k0 < kStage; k0 += 16) {
        float scales[4] = {1, 1, 1, 1};
        if (V::kCoded) {
          const Vec2 four = load<Vec2>(room.value_scales + tile * kKvTile / f.group * kStage + k0 + 4 * c);
          scales[0] = low<f16>(four.x), scales[1] = high<f16>(four.x);
          scales[2] = low<f16>(four.y), scales[3] = high<f16>(four.y);
        }
        uint32_t values[V::kParts][4];
        for (int part = 0; part < V::kParts; part++) {
          V::load16(room.values + tile * value_pitch, k0, part, values[part]);
        }
#pragma unroll
        for (int n = 0; n < columns; n++) {
          const Vec4 four = load<Vec4>(room.weights + place_of(n * 8 + g, k0 + 4 * c));
          float p[4] = {as_float(four.x), as_float(four.y), as_float(four.z), as_float(four.w)};
          // The scales of tokens that are not there may be NaN.
          for (int r = 0; V::kCoded && r < 4; r++) p[r] = p[r] != 0 ? p[r] * scales[r] : 0;
#pragma unroll
          for (int q = 0; q < weight_parts; q++) {
            const uint32_t b[2] = {pair_part(p[0], p[1], q), pair_part(p[2], p[3], q)};
            for (int part = 0; part < V::kParts; part++) mma<M>(state.sums[j][n], values[part], b);
          }
        }
      }
    }
  }
  MEMLM_SYNC_THREADS();
}

// The sums [width] of a row, in shared memory, times factor: to out, transformed back by way of scratch.
template <class T>
MEMLM_DEVICE void finish(const Attention& a, float* sums, float* scratch, float factor, int64_t row,
                         int head) {
  const KvLayout& f = a.cache.layout;
  const float* from = sums;
  if (a.cache.piece > 1) {
    hadamard(sums, scratch, f.width, a.cache.piece, a.cache.root);
    from = scratch;
  }
  T* const to = static_cast<T*>(a.out) + row * a.out_stride + static_cast<int64_t>(head) * f.dim;
  for (int i = lane(); i < f.dim; i += kWarp) to[i] = from_float<T>(from[i] * factor);
}

// What the weights' sum becomes with a sink, relative to the larger of both, and the factor of what was
// relative to `maximum`.
MEMLM_DEVICE float normaliser(const Attention& a, int head, float maximum, float total) {
  if (!a.sinks) return 1 / total;
  const float sink = a.sinks[head], base = sink > maximum ? sink : maximum;
  const float factor = exp2_approx((maximum - base) * kLog2E);
  return factor / fma_f32(total, factor, exp2_approx((sink - base) * kLog2E));
}

template <class T, memlm_kv_type type>
constexpr int kQueryParts = kSame<T, M> && type <= MEMLM_KV_BF16 ? 1 : 2;

// Queries into shared memory, by way of `scratch` [2][kWarps][width].
template <class T, int parts, int rows>
MEMLM_DEVICE void load_queries(const Attention& a, const Work& w, float* scratch, M* to) {
  const KvLayout& f = a.cache.layout;
  float *raw = scratch + warp() * f.width, *turned = raw + kWarps * f.width;
  for (int row = warp(); row < rows; row += kWarps) {
    const int i = w.first + row;
    const T* const from = static_cast<const T*>(a.q) + (w.first_row + i / a.group) * a.q_stride +
                          static_cast<int64_t>(w.kv_head * a.group + i % a.group) * f.dim;
    for (int d = lane(); d < f.width; d += kWarp) {
      const float x = row < w.rows && d < f.dim ? to_float(from[d]) : 0;
      raw[d] = a.cache.piece > 1 ? x * a.scale : x;
    }
    MEMLM_SYNC_WARP();
    const float* x = raw;
    if (a.cache.piece > 1) {
      hadamard(raw, turned, f.width, a.cache.piece, a.cache.root);
      x = turned;
    }
    for (int d = 2 * lane(); d < f.width; d += 2 * kWarp) {
      for (int part = 0; part < parts; part++) {
        store(to + (part * rows + row) * a.query_pitch + d, pair_part(x[d], x[d + 1], part));
      }
    }
    MEMLM_SYNC_WARP();
  }
  MEMLM_SYNC_THREADS();
}

template <class T, memlm_kv_type type, int columns, int tiles>
__global__ void __launch_bounds__(kThreads, columns == 1 ? 4 : tiles == 2 ? 3 : 2)
    paged_attention_kernel(const Attention a) {
  constexpr int kRows = 8 * columns, kOfRow = kThreads / kRows;
  constexpr int kParts = kQueryParts<T, type>, kWeightParts = kSame<T, f16> ? 2 : 1;
  const KvCache& cache = a.cache;
  const KvLayout& f = cache.layout;
  const Deal deal = {a.group, kRows, 1};
  const int sequence = sequence_of(cache.rows, cache.sequences, deal, block_x());
  const int64_t first_row = cache.rows[sequence], count = cache.rows[sequence + 1] - first_row;
  const int64_t length = cache.lengths[sequence],
                first = (block_x() - first_item(cache.rows, sequence, deal)) * kRows;
  if (first >= count * a.group) return;
  const Work w = {sequence, block_y(), static_cast<int>(least(kRows, count * a.group - first)), first_row,
                  length - count, static_cast<int>(first), cache.piece > 1 ? 1 : a.scale};
  // What its queries see.
  const int64_t position = w.before + w.first / a.group;
  int64_t lo = a.window && position >= a.window ? position - a.window + 1 : 0;
  int64_t hi = w.before + (w.first + w.rows - 1) / a.group + 1;
  const bool is_split = a.splits > 1 && count <= a.split_tokens;
  if (is_split) {
    lo = most(lo, block_z() * a.chunk);
    hi = least(hi, (block_z() + 1) * a.chunk);
  }
  if (is_split ? lo >= hi : block_z() > 0) return;

  uint8_t* const stage = shared<uint8_t>();
  Room room;
  room.queries = reinterpret_cast<M*>(stage + a.stage_bytes);
  room.weights = reinterpret_cast<float*>(room.queries + kParts * kRows * a.query_pitch);
  room.factors = room.weights + kRows * kWeightsPitch;
  load_queries<T, kParts, kRows>(a, w, reinterpret_cast<float*>(stage), room.queries);

  State<columns, tiles> state = {};
  state.maximum = -INFINITY;
  if constexpr (type == MEMLM_KV_F32) {
    attend<Floats32, Floats32, kParts, kWeightParts>(a, w, room, f, nullptr, lo, hi, state);
  } else if constexpr (type == MEMLM_KV_BF16) {
    attend<Floats16, Floats16, kParts, kWeightParts>(a, w, room, f, nullptr, lo, hi, state);
  } else if constexpr (type == MEMLM_KV_INT8) {
    attend<Codes8, Codes8, kParts, kWeightParts>(a, w, room, f, nullptr, lo, hi, state);
  } else {
    const int64_t newest = (length - 1) / f.tokens * f.tokens;
    if (lo < newest) {
      attend<Nibbles<5>, Nibbles<4>, kParts, kWeightParts>(a, w, room, f, nullptr, lo, least(hi, newest),
                                                           state);
    }
    if (hi > newest) {
      const uint8_t* const tail = tail_of(cache, sequence, w.kv_head);
      attend<Floats16, Floats16, kParts, kWeightParts>(a, w, room, cache.tail, tail, most(lo, newest), hi,
                                                       state);
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
  float* const scratch = reinterpret_cast<float*>(room.queries) + warp() * f.width;
  for (int one = warp(); one < w.rows; one += kWarps) {
    const int its_token = (w.first + one) / a.group;
    const int its_head = w.kv_head * a.group + (w.first + one) % a.group;
    const int64_t its_row = first_row + its_token;
    if (is_split) {
      float* const to = a.sums + part_of(a, sequence, its_row, its_token, its_head, block_z()) * f.width;
      for (int i = lane(); i < f.width; i += kWarp) to[i] = sums[one * pitch + i];
    } else {
      finish<T>(a, sums + one * pitch, scratch, room.factors[one], its_row, its_head);
    }
  }
}

// The results of sequences that are shared out: a warp for each row and head.
template <class T>
__global__ void __launch_bounds__(kThreads) combine_kernel(const Attention a, int rows) {
  const KvCache& cache = a.cache;
  const int width = cache.layout.width, item = block_x() * kWarps + warp();
  const int row = item / a.heads, head = item % a.heads;
  if (row >= rows || row >= cache.rows[cache.sequences]) return;
  const int sequence = sequence_of(cache.rows, cache.sequences, {1, 1, 0}, row);
  const int64_t first_row = cache.rows[sequence], count = cache.rows[sequence + 1] - first_row;
  if (count > a.split_tokens) return;
  const int token = static_cast<int>(row - first_row);
  const int64_t position = cache.lengths[sequence] - count + token;
  const int64_t lo = a.window && position >= a.window ? position - a.window + 1 : 0;
  const int begin = static_cast<int>(lo / a.chunk), end = static_cast<int>(position / a.chunk) + 1;
  const int64_t part = part_of(a, sequence, row, token, head, 0);
  float maximum = -INFINITY;
  for (int i = begin; i < end; i++) maximum = larger(maximum, a.totals[2 * (part + i)]);
  float total = 0, sums[kMostDim / kWarp] = {};
  for (int i = begin; i < end; i++) {
    const float factor = exp2_approx((a.totals[2 * (part + i)] - maximum) * kLog2E);
    total = fma_f32(a.totals[2 * (part + i) + 1], factor, total);
#pragma unroll
    for (int j = 0; j < kMostDim / kWarp; j++) {
      const int at = lane() + j * kWarp;
      if (at < width) sums[j] = fma_f32(a.sums[(part + i) * width + at], factor, sums[j]);
    }
  }
  float* const mine = shared<float>() + warp() * 2 * width;
#pragma unroll
  for (int j = 0; j < kMostDim / kWarp; j++) {
    if (lane() + j * kWarp < width) mine[lane() + j * kWarp] = sums[j];
  }
  MEMLM_SYNC_WARP();
  finish<T>(a, mine, mine + width, normaliser(a, head, maximum, total), row, head);
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
  return codes + (K::kCoded ? K::kStage * f.groups * 4 : 0);
}
int stage_bytes(memlm_kv_type type, const KvCache& c) {
  switch (type) {
    case MEMLM_KV_F32: return stage_bytes<Floats32, Floats32>(c.layout);
    case MEMLM_KV_BF16: return stage_bytes<Floats16, Floats16>(c.layout);
    case MEMLM_KV_INT8: return stage_bytes<Codes8, Codes8>(c.layout);
    default:
      return static_cast<int>(
          most(stage_bytes<Nibbles<5>, Nibbles<4>>(c.layout), stage_bytes<Floats16, Floats16>(c.tail)));
  }
}

template <class T>
memlm_status begin(const Gpu& gpu, memlm_kv_type type, int64_t rows, Attention& a, void* stream) {
  const int width = a.cache.layout.width, stage = stage_bytes(type, a.cache);
  const bool exact = type <= MEMLM_KV_BF16 && (kSame<T, bf16> || gpu.arch < 800);  // as kQueryParts
  int tile = rows * a.group > 8 * static_cast<int64_t>(a.cache.sequences) ? 32 : 8, bytes;
  for (;; tile = 8) {
    a.stage_bytes = static_cast<int>(most(stage, tile * (width + 4) * 4));
    bytes = a.stage_bytes + tile * ((exact ? 1 : 2) * a.query_pitch * 2 + (kWeightsPitch + 1) * 4);
    if (bytes <= gpu.shared_bytes) break;
    if (tile == 8) {
      return fail(MEMLM_UNSUPPORTED, "pool: head_dim = %d needs %d bytes of shared memory, the device has %d",
                  a.cache.layout.dim, bytes, gpu.shared_bytes);
    }
  }
  const Grid grid = {items(rows, a.cache.sequences, {a.group, tile, 1}), a.heads / a.group, a.splits};
  MEMLM_PASS(started(launch(kernel_of<T>(type, tile, width > 128), grid, kThreads, bytes, stream, a)));
  if (a.splits == 1) return MEMLM_OK;
  return started(launch(&combine_kernel<T>, {ceil_div(rows * a.heads, kWarps)}, kThreads,
                        kWarps * 2 * width * 4, stream, a, rows));
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
  a.window = args->window, a.scale = args->scale, a.softcap = args->softcap;
  a.slopes = args->slopes, a.sinks = args->sinks;
  a.heads = static_cast<int>(args->heads), a.group = static_cast<int>(args->heads / pool->kv_heads);
  // Rows 32 bytes apart, of 128: eight of them lie on all banks.
  a.query_pitch = static_cast<int>(round_up(f.width, 64)) + 16;

  const int64_t longest = bounds->longest ? bounds->longest : sequences->table_stride * f.tokens;
  a.chunk = most(kLeastChunk, round_up(ceil_div(longest, kMostChunks), kLeastChunk));
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
