// y = x W^T over packed weights, numbers on the left: the kernel of w2_matmul, w4_matmul and w8_matmul.
//
// W is the A operand of the tensor cores, whose rows are features, and 8 tokens are the columns of B: few
// tokens waste little.  The rows and the k of a product may stand in any order that both operands share,
// so that the canonical layout (memlm/formats.py) is read as it is.  A warp takes a pair of tiles, 32
// rows, and 32 k at a time: a step.
//
//   lane (g, c), g = lane / 4, c = lane % 4, has rows 4 (g % 4) .. + 3 of tile g / 4, and 8 k from 8 c on:
//   4 bits: one piece of 16 bytes; 8 bits: two; 2 bits: one, of which it uses half
//
//            k 0 ... 7 | 8 ... 15 | 16 ... 23 | 24 ... 31
//   rows  0-3   lane 0 |    1     |     2     |    3
//         4-7        4 |    5     |     6     |    7
//         ...                                              (the second tile: lanes 16 to 31)
//
// Of its rows the lane makes rows g and g + 8 of two A operands, its first two rows and its last two; of
// its 8 k those that m16n8k16 calls 2c, 2c + 1, 2c + 8, 2c + 9, first of its k 0-3, then of 4-7.  What it
// holds of the result are 4 consecutive features of 2 tokens.
//
// Codes go into the product as the integers they are, exactly; the f32 sums of 32 k are multiplied by the
// scale and added up in f32.  An offset is multiplied by the sum of its k of x, which a product with ones
// gives in the very lanes that need it.  Levels of NF4 are rounded to x's type.
//
// product.h says how the work is shared out, and adds up the parts.
//
//   stage of the pipeline, 64 k:  [warp][codes | scales | offsets]  [slice][x: tokens x 64]
//
// Codes, scales and offsets of a stage are read by the warp that copied them; x by all that share a slice.
#ifndef MEMLM_CUDA_WEIGHT_ONLY_H_
#define MEMLM_CUDA_WEIGHT_ONLY_H_

#include "product.h"

namespace memlm::cuda {

// Stages in flight: what is on its way must cover the memory's latency (some 40 KB a multiprocessor at
// 2 TB/s and 600 ns), and two blocks must fit.  Before 8.0 nothing is asynchronous, and 64 KB are all.
constexpr int stages_of(int arch, int bits) { return arch < 800 ? 2 : bits == 8 ? 3 : 4; }

// The levels of a 4-bit code as bytes, for lookups: bits 0-7 and 8-15 of their 16-bit floats.
struct Levels {
  uint32_t low[4], high[4];
};

struct WeightOnly : Product {
  const uint8_t* codes;
  const uint8_t *scales, *offsets;
  int scale_bytes;  // of one
  Levels levels;
  float zero;  // subtracted from codes
  int k, groups, group_steps;  // steps of k in a group
  int64_t code_stride;         // bytes of a tile's codes: `steps` times those of a step
  const void* x;
  int64_t x_stride;
};

// Bytes of one step: of a lane's codes, and of the pair's scales for one group.
constexpr int pieces_of(int bits) { return bits == 8 ? 2 : 1; }
constexpr int codes_bytes(int bits) { return kStageSteps * pieces_of(bits) * kWarp * 16; }
constexpr int kMostScales = kStageSteps * kPair * 4;  // f32, a group for each step

constexpr int warp_bytes(int bits) { return codes_bytes(bits) + 2 * kMostScales; }
constexpr int stage_bytes(int bits, int token_tiles) {
  return kWarps * warp_bytes(bits) + slices_of(token_tiles) * token_tiles * kTokenTile * kStageK * 2;
}

// ---- Codes to numbers: 8 k of one row, as four pairs in order ----

// Bits of 1 in the place where a small integer stands beside it: 1024 in f16, 128 in bf16.
template <class T>
constexpr uint32_t kMagic = 0x64006400;
template <>
constexpr uint32_t kMagic<bf16> = 0x43004300;
template <class T>
constexpr float kMagicValue = 1024;
template <>
constexpr float kMagicValue<bf16> = 128;

// 2 and 4 bits.  Byte j of the word holds k j in its lowest bits, and k 4 + j in the next.
template <class T, int bits>
struct Integers {
  static constexpr int kBits = bits;
  uint32_t one, minus_magic, upper, minus_upper;

  MEMLM_DEVICE explicit Integers(const WeightOnly& p) {
    // The upper field is read where it stands, times 2^bits, if the mantissa (f16: 10 bits, bf16: 7) has
    // room for it.
    const float factor = upper_in_place() ? 1.0f / (1 << bits) : 1.0f;
    one = pair<T>(1, 1);
    minus_magic = pair<T>(-(kMagicValue<T> + p.zero), -(kMagicValue<T> + p.zero));
    upper = pair<T>(factor, factor);
    const float less = -(kMagicValue<T> * factor + p.zero);
    minus_upper = pair<T>(less, less);
  }

  static constexpr bool upper_in_place() { return (1 << 2 * bits) <= kMagicValue<T>; }

  MEMLM_DEVICE void unpack(const uint32_t (&words)[1], uint32_t (&pairs)[4]) const {
    constexpr uint32_t mask = ((1u << bits) - 1) * 0x00010001u;
    for (int i = 0; i < 2; i++) {
      // Bytes 2i and 2i + 1, each into a half.
      const uint32_t both = permute_bytes(words[0], 0, i ? 0x4342 : 0x4140);
      pairs[i] = fma_pair<T>((both & mask) | kMagic<T>, one, minus_magic);
      const uint32_t above = upper_in_place() ? both & mask << bits : both >> bits & mask;
      pairs[2 + i] = fma_pair<T>(above | kMagic<T>, upper, minus_upper);
    }
  }
};

// 8 bits: two words of 4 k each.
template <class T>
struct Bytes {
  static constexpr int kBits = 8;

  MEMLM_DEVICE explicit Bytes(const WeightOnly&) {}

  MEMLM_DEVICE void unpack(const uint32_t (&words)[2], uint32_t (&pairs)[4]) const {
    for (int i = 0; i < 4; i++) {
      const uint32_t raised = words[i / 2] ^ 0x80808080u;  // q + 128
      pairs[i] = unpack_pair(raised, i % 2);
    }
  }

 private:
  static MEMLM_DEVICE uint32_t unpack_pair(uint32_t raised, int which);
};
template <>
MEMLM_DEVICE uint32_t Bytes<f16>::unpack_pair(uint32_t raised, int which) {
  const uint32_t both = permute_bytes(raised, kMagic<f16>, which ? 0x7372 : 0x7170);
  return fma_pair<f16>(both, pair<f16>(1, 1), pair<f16>(-1152, -1152));
}
template <>
MEMLM_DEVICE uint32_t Bytes<bf16>::unpack_pair(uint32_t raised, int which) {
  // 2^23 + q + 128 in f32; q itself fits bf16.
  const float low = as_float(permute_bytes(raised, 0x4b000000, which ? 0x7442 : 0x7440)) - 8388736.0f;
  const float high = as_float(permute_bytes(raised, 0x4b000000, which ? 0x7443 : 0x7441)) - 8388736.0f;
  return pair<bf16>(low, high);
}

// 4 bits that stand for levels.
template <class T>
struct Lookup {
  static constexpr int kBits = 4;
  Levels levels;

  MEMLM_DEVICE explicit Lookup(const WeightOnly& p) : levels(p.levels) {}

  // The four bytes of a table of 16 that the nibbles of `select` name.
  static MEMLM_DEVICE uint32_t bytes_at(const uint32_t (&table)[4], uint32_t select) {
    const uint32_t below = permute_bytes(table[0], table[1], select & 0x7777);
    const uint32_t above = permute_bytes(table[2], table[3], select & 0x7777);
    return permute_bytes(below, above, 0x3210 | (select & 0x8888) >> 1);
  }

  MEMLM_DEVICE void unpack(const uint32_t (&words)[1], uint32_t (&pairs)[4]) const {
    for (int i = 0; i < 2; i++) {
      const uint32_t select = words[0] >> 16 * i;  // k 2i, 2i + 4, 2i + 1, 2i + 5
      const uint32_t low = bytes_at(levels.low, select), high = bytes_at(levels.high, select);
      pairs[i] = permute_bytes(low, high, 0x6240);
      pairs[2 + i] = permute_bytes(low, high, 0x7351);
    }
  }
};

// ---- The kernel ----

template <class T, class Codec, int kTokenTiles>
__global__ void __launch_bounds__(kThreads, 2) weight_only_kernel(const WeightOnly p) {
  using Here = Place<kTokenTiles>;
  constexpr int kBits = Codec::kBits, kRows = Here::kRows, kTokens = Here::kTokens;
  constexpr int kStages = stages_of(kArch, kBits), kPieces = pieces_of(kBits);
  constexpr int kXRow = kStageK * 2, kWarpBytes = warp_bytes(kBits), kCodesBytes = codes_bytes(kBits);
  constexpr int kStageBytes = stage_bytes(kBits, kTokenTiles);

  uint8_t* const memory = shared<uint8_t>();
  const Here here(p);
  const int row = here.row, slice = here.slice, g = here.g, c = here.c, token0 = here.token0;

  auto begin_copies = [&](int stage) {
    uint8_t* const to = memory + stage % kStages * kStageBytes;
    uint8_t* const weights = to + warp() * kWarpBytes;
    const int step0 = (here.first + stage) * kStageSteps;
    const bool valid = here.first + stage < here.last;
    for (int s = 0; s < kStageSteps; s++) {
      const int step = step0 + s;
      const bool there = valid && here.have && step < p.steps;
      for (int i = 0; i < kPieces; i++) {
        // Pieces are 4 rows of a block of 64 bytes; a step of a tile has blocks of 4, 8 or 16 k.
        const int in_step = kBits == 8 ? 2 * c + i : kBits == 4 ? c : c / 2;
        const int64_t offset = here.mine * p.code_stride +
                               (static_cast<int64_t>(step) * kBits + in_step) * 64 + g % 4 * 16;
        copy_async(weights + ((s * kPieces + i) * kWarp + lane()) * 16, p.codes + (there ? offset : 0), there);
      }
    }
    // Scales, and offsets, of the groups that begin in the stage or go on in it.
    const int pieces = p.scale_bytes;  // of 16 bytes: a tile has 16 scales for a group
    const int groups = p.group_steps == 1 ? 2 : 1;
    for (int i = lane(); i < groups * 2 * pieces; i += kWarp) {
      const int group = step0 / p.group_steps + i / (2 * pieces), tile = tile_of(p, here.at, i / pieces % 2);
      const bool there = valid && tile < p.tiles && group < p.groups;
      const int64_t offset =
          there ? ((static_cast<int64_t>(tile) * p.groups + group) * pieces + i % pieces) * 16 : 0;
      copy_async(weights + kCodesBytes + i * 16, p.scales + offset, there);
      if (p.offsets) copy_async(weights + kCodesBytes + kMostScales + i * 16, p.offsets + offset, there);
    }
    // x: 8 pieces of 16 bytes a token, halves exchanged for odd tokens, so that 8 lanes that read pieces
    // of two tokens meet all banks.
    uint8_t* const x = to + kWarps * kWarpBytes + slice * kTokens * kXRow;
    for (int i = row * kWarp + lane(); i < kTokens * 8; i += kRows * kWarp) {
      const int token = i / 8, piece = i % 8, k = step0 * kStep + piece * 8;
      const bool there = valid && token0 + token < p.m && k < p.k;
      const int64_t offset = there ? (token0 + token) * p.x_stride + k : 0;
      copy_async(x + token * kXRow + (piece ^ token % 2 * 4) * 16, static_cast<const T*>(p.x) + offset, there);
    }
    commit_copies();
  };

  float sums[kTokenTiles][2][4] = {};
  const Codec codec(p);
  const uint32_t ones[4] = {pair<T>(1, 1), pair<T>(1, 1), pair<T>(1, 1), pair<T>(1, 1)};

#pragma unroll
  for (int i = 0; i < kStages - 1; i++) begin_copies(i);
  for (int stage = 0; stage < here.count; stage++) {
    wait_copies<kStages - 2>();
    MEMLM_SYNC_THREADS();  // this stage is there for all, and the one before is read
    begin_copies(stage + kStages - 1);
    const uint8_t* const from = memory + stage % kStages * kStageBytes;
    const uint8_t* const weights = from + warp() * kWarpBytes;
    const uint8_t* const x = from + kWarps * kWarpBytes + slice * kTokens * kXRow;
#pragma unroll
    for (int s = 0; s < kStageSteps; s++) {
      Vec4 pieces[kPieces];
#pragma unroll
      for (int i = 0; i < kPieces; i++) {
        pieces[i] = load<Vec4>(weights + ((s * kPieces + i) * kWarp + lane()) * 16);
      }
      uint32_t w[4][4];  // [feature][pair of k]
#pragma unroll
      for (int r = 0; r < 4; r++) {
        uint32_t words[kPieces];
#pragma unroll
        for (int i = 0; i < kPieces; i++) {
          const Vec4 v = pieces[i];
          words[i] = r == 0 ? v.x : r == 1 ? v.y : r == 2 ? v.z : v.w;
          if (kBits == 2) words[i] >>= c % 2 * 4;  // the upper half of a byte has k 8 to 15
        }
        codec.unpack(words, w[r]);
      }
      // Four scales, and offsets, of the lane's rows.
      const int slot = p.group_steps == 1 ? s : 0;
      const uint8_t* const place = weights + kCodesBytes + (slot * kPair + g * 4) * p.scale_bytes;
      float scales[4], offsets[4] = {};
      load_scales(place, p.scale_bytes, scales);
      if (p.offsets) load_scales(place + kMostScales, p.scale_bytes, offsets);
#pragma unroll
      for (int t = 0; t < kTokenTiles; t++) {
        const int token = t * kTokenTile + g;
        const Vec4 xs = load<Vec4>(x + token * kXRow + ((s * 4 + c) ^ token % 2 * 4) * 16);
        const uint32_t b[2][2] = {{xs.x, xs.y}, {xs.z, xs.w}};
        float products[2][4] = {}, total[4] = {};
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const uint32_t a0[4] = {w[0][2 * h], w[1][2 * h], w[0][2 * h + 1], w[1][2 * h + 1]};
          const uint32_t a1[4] = {w[2][2 * h], w[3][2 * h], w[2][2 * h + 1], w[3][2 * h + 1]};
          mma<T>(products[0], a0, b[h]);
          mma<T>(products[1], a1, b[h]);
          if (p.offsets) mma<T>(total, ones, b[h]);
        }
#pragma unroll
        for (int i = 0; i < 8; i++) {
          sums[t][i / 4][i % 4] += scales[i / 2] * products[i / 4][i % 4] + offsets[i / 2] * total[i % 2];
        }
      }
    }
  }
  wait_copies<0>();
  MEMLM_SYNC_THREADS();

  if (add_up<kTokenTiles>(p, slice, sums)) finish<T>(p, here, sums);
}

// ---- The launcher ----

template <class T, class Codec>
memlm_status launch_weight_only(const WeightOnly& p, const Plan& plan) {
  const int tokens = plan.token_tiles;
  void (*kernel)(WeightOnly) = tokens == 1   ? &weight_only_kernel<T, Codec, 1>
                               : tokens == 2 ? &weight_only_kernel<T, Codec, 2>
                               : tokens == 4 ? &weight_only_kernel<T, Codec, 4>
                                             : &weight_only_kernel<T, Codec, 8>;
  const int bytes = stages_of(plan.gpu.arch, Codec::kBits) * stage_bytes(Codec::kBits, tokens);
  return started(launch(kernel, plan.grid, kThreads, bytes, plan.stream, p));
}

// One codec's launchers, by the type of x.
struct Launchers {
  memlm_status (*of_f16)(const WeightOnly&, const Plan&);
  memlm_status (*of_bf16)(const WeightOnly&, const Plan&);
};
template <template <class> class Codec>
constexpr Launchers kLaunchers = {&launch_weight_only<f16, Codec<f16>>, &launch_weight_only<bf16, Codec<bf16>>};

// memlm_cuda_w<bits>_matmul.
memlm_status weight_only(const memlm_packed* w, int bits, const memlm_matmul_args* args, memlm_cuda_queue* queue,
                         const Launchers& launchers);

}  // namespace memlm::cuda

#endif
