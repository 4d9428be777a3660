// y = x W^T over packed weights, numbers on the left: the kernel of w2_matmul, w4_matmul, w8_matmul and
// w4_sparse_matmul.
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
// product.h shares out tiles, tokens and k.
//
//   stage of the pipeline, 64 k:  [warp][weights | scales | offsets]  [slice][x: tokens x 64]
//
// Weights, scales and offsets of a stage are read by the warp that copied them; x by all that share a slice.
// A class `Weights` says what a pattern's are, how they come into a stage, and what they multiply: Dense
// here, sparse ones in w4_sparse_matmul.cu.
#ifndef MEMLM_CUDA_WEIGHT_ONLY_H_
#define MEMLM_CUDA_WEIGHT_ONLY_H_

#include "product.h"

namespace memlm::cuda {

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
  int k, groups, group_shift;  // 2^group_shift steps of k in a group
  const void* x;
  int64_t x_stride;
};

constexpr int kMostScales = kStageSteps * kPair * 4;  // bytes: f32, a group for each step
constexpr int kXRow = kStageK * 2;                    // bytes of a token in a stage

template <class Weights>
constexpr int kWarpBytes = Weights::kBytes + 2 * kMostScales;
template <class Weights, int token_tiles>
constexpr int kStageBytes =
    kWarps * kWarpBytes<Weights> + slices_of(token_tiles) * token_tiles * kTokenTile * kXRow;

// ---- Codes to numbers: 8 k of one row, as four pairs in order ----

// Bits of 1 in the place where a small integer stands beside it: 1024 in f16, 128 in bf16.
template <class T>
constexpr uint32_t kMagic = 0x64006400;
template <>
constexpr uint32_t kMagic<bf16> = 0x43004300;
// Two halves, each 2^-power.
template <class T>
constexpr uint32_t power_of_two(int power) {
  return 0x3c003c00 - power * 0x04000400;
}
template <>
constexpr uint32_t power_of_two<bf16>(int power) {
  return 0x3f803f80 - power * 0x00800080;
}
template <class T>
constexpr float kMagicValue = 1024;
template <>
constexpr float kMagicValue<bf16> = 128;

// 2 and 4 bits.  Byte j of the word holds k j in its lowest bits, and k 4 + j in the next.
template <class T, int bits>
struct Integers {
  static constexpr int kBits = bits;
  uint32_t minus_magic, minus_upper;

  MEMLM_DEVICE explicit Integers(const WeightOnly& p) {
    // The upper field is read where it stands, times 2^bits, if the mantissa (f16: 10 bits, bf16: 7) has
    // room for it.
    const float factor = upper_in_place() ? 1.0f / (1 << bits) : 1.0f;
    minus_magic = pair<T>(-(kMagicValue<T> + p.zero), -(kMagicValue<T> + p.zero));
    const float less = -(kMagicValue<T> * factor + p.zero);
    minus_upper = pair<T>(less, less);
  }

  static constexpr bool upper_in_place() { return (1 << 2 * bits) <= kMagicValue<T>; }

  MEMLM_DEVICE void unpack(const uint32_t (&words)[1], uint32_t (&pairs)[4]) const {
    constexpr uint32_t mask = ((1u << bits) - 1) * 0x00010001u;
    for (int i = 0; i < 2; i++) {
      // Bytes 2i and 2i + 1, each into a half.
      const uint32_t both = permute_bytes(words[0], 0, i ? 0x4342 : 0x4140);
      pairs[i] = fma_pair<T>(select_bits<mask, kMagic<T>>(both), power_of_two<T>(0), minus_magic);
      const uint32_t above = upper_in_place() ? select_bits<mask << bits, kMagic<T>>(both)
                                              : select_bits<mask, kMagic<T>>(both >> bits);
      pairs[2 + i] = fma_pair<T>(above, power_of_two<T>(upper_in_place() ? bits : 0), minus_upper);
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
  return fma_pair<f16>(both, power_of_two<f16>(0), pair<f16>(-1152, -1152));
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

// Where 16 bytes of a token in a stage lie: turned about so that both 8 lanes that read 4 pieces of two
// tokens and 8 that read one piece of each of 8 tokens meet all banks.
MEMLM_DEVICE int x_place(int token, int piece) {
  return token * kXRow + (piece ^ (token % 2 * 4 + token / 2 % 4)) * 16;
}

// The lane's 8 k of a token as two B operands: k 0-3, then 4-7.
MEMLM_DEVICE void read_x(const uint8_t* x, int token, int piece, uint32_t (&b)[2][2]) {
  const Vec4 v = load<Vec4>(x + x_place(token, piece));
  b[0][0] = v.x, b[0][1] = v.y, b[1][0] = v.z, b[1][1] = v.w;
}

// Adds the product of 8 k of the lane's 4 rows with 8 tokens to its sums, as product.h has them.
template <class T>
MEMLM_DEVICE void multiply(const uint32_t (&w)[4][4], const uint32_t (&b)[2][2], float (&products)[2][4]) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const uint32_t a0[4] = {w[0][2 * h], w[1][2 * h], w[0][2 * h + 1], w[1][2 * h + 1]};
    const uint32_t a1[4] = {w[2][2 * h], w[3][2 * h], w[2][2 * h + 1], w[3][2 * h + 1]};
    mma<T>(products[0], a0, b[h]);
    mma<T>(products[1], a1, b[h]);
  }
}

// All weights, as memlm/formats.py draws them.
template <class Element, class Codec>
struct Dense {
  using T = Element;
  using Parameters = WeightOnly;
  static constexpr int kBits = Codec::kBits;
  static constexpr bool kOffsets = kBits < 8;  // may be there
  // Up to so many tiles of tokens, sums leave registers for both steps of a stage at once; 8-bit codes of a
  // step are twice as many registers.
  static constexpr int kUnrolledTiles = kBits == 8 ? 2 : 4;
  using Codes = DenseCodes<kBits>;
  static constexpr int kBytes = Codes::kBytes;

  // Stages in flight: what is on its way must cover the memory's latency (some 40 KB a multiprocessor at
  // 2 TB/s and 600 ns), and two blocks must fit.  Before 8.0 nothing is asynchronous, and 64 KB are all.
  static constexpr int stages_of(int arch) { return arch < 800 ? 2 : kBits == 8 ? 3 : 4; }

  const Codec codec;
  Codes codes;
  uint32_t w[4][4];  // [feature][pair of k], of a step

  template <class Here>
  MEMLM_DEVICE Dense(const WeightOnly& p, const Here& here) : codec(p), codes(p.codes, p.steps, here) {}

  // Begins to copy what the next stage, from step0 on, has; nothing where not `valid`.
  template <class Here>
  MEMLM_DEVICE void begin_copies(const WeightOnly&, const Here&, uint8_t* to, int step0, bool valid) {
    codes.begin_copies(to, step0, valid);
  }

  // Makes step s of a stage ready to be multiplied.
  MEMLM_DEVICE void unpack(const uint8_t* from, int s) {
    Vec4 pieces[Codes::kPieces];
    codes.read(from, s, pieces);
#pragma unroll
    for (int r = 0; r < 4; r++) {
      uint32_t words[Codes::kPieces];
#pragma unroll
      for (int i = 0; i < Codes::kPieces; i++) {
        const Vec4 v = pieces[i];
        words[i] = r == 0 ? v.x : r == 1 ? v.y : r == 2 ? v.z : v.w;
        if (kBits == 2) words[i] >>= lane() % 2 * 4;  // the upper half of a byte has k 8 to 15
      }
      codec.unpack(words, w[r]);
    }
  }

  // Products of step s with the 8 tokens from token0 on.
  MEMLM_DEVICE void multiply(const uint8_t* x, int token0, int s, float (&products)[2][4]) const {
    uint32_t b[2][2];
    read_x(x, token0 + lane() / 4, s * 4 + lane() % 4, b);
    cuda::multiply<T>(w, b, products);
  }
};

// Of few tokens three blocks are to fit, whose copies under way are as much as those of two with a stage
// more.
template <class Weights, int kTokenTiles>
constexpr int stages_of(int arch) {
  return kTokenTiles == 1 && arch >= 800 && Weights::stages_of(arch) > 3 ? 3 : Weights::stages_of(arch);
}

template <class Weights, int kTokenTiles>
__global__ void __launch_bounds__(kThreads, kTokenTiles == 1 ? 3 : 2)
    weight_only_kernel(const typename Weights::Parameters p) {
  using T = typename Weights::T;
  using Here = Place<kTokenTiles>;
  constexpr int kRows = Here::kRows, kTokens = Here::kTokens,
                kStages = stages_of<Weights, kTokenTiles>(kArch);
  constexpr int kStage = kStageBytes<Weights, kTokenTiles>;

  uint8_t* const memory = shared<uint8_t>();
  const Here here(p);
  const int row = here.row, slice = here.slice, g = here.g, c = here.c, token0 = here.token0;
  Weights weights(p, here);

  // Where the lane's pieces of 16 bytes lie in the first stage; later ones follow at fixed distances.
  // Scales, and offsets: a tile has 16 for a group, which are 2 or 4 pieces; a stage has 1 or 2 groups, so
  // that a lane brings at most one piece.
  const int scale_pieces = p.scale_bytes, stage_groups = p.group_shift ? 1 : kStageSteps;
  const int scale_tile = tile_of(p, here.at, lane() / scale_pieces % 2),
            later_group = lane() / (2 * scale_pieces);
  const bool brings_scales = later_group < stage_groups && scale_tile < p.tiles;
  const int64_t scales_begin =
      (static_cast<int64_t>(scale_tile) * p.groups * scale_pieces + lane() % scale_pieces) * 16;
  // x: 8 pieces a token.
  constexpr int kTokensAtOnce = kRows * kWarp / 8, kXPieces = (kTokens + kTokensAtOnce - 1) / kTokensAtOnce;
  static_assert(kTokens % kTokensAtOnce == 0, "all threads of a slice bring as many");
  const int x_token = (row * kWarp + lane()) / 8, x_piece = lane() % 8;
  const T* x_next =
      static_cast<const T*>(p.x) + (token0 + x_token) * p.x_stride + here.first * kStageK + x_piece * 8;

  auto begin_copies = [&](int stage) {
    uint8_t* const to = memory + stage % kStages * kStage;
    uint8_t* const of_warp = to + warp() * kWarpBytes<Weights>;
    const int step0 = (here.first + stage) * kStageSteps;
    const bool valid = here.first + stage < here.last;
    weights.begin_copies(p, here, of_warp, step0, valid);
    if (later_group < stage_groups) {
      const int group = (step0 >> p.group_shift) + later_group;
      const bool there = valid && brings_scales && group < p.groups;
      const int64_t offset = scales_begin + static_cast<int64_t>(group) * (scale_pieces * 16);
      uint8_t* const scales = of_warp + Weights::kBytes + lane() * 16;
      copy_async(scales, p.scales + offset, there);
      if (Weights::kOffsets && p.offsets) copy_async(scales + kMostScales, p.offsets + offset, there);
    }
    uint8_t* const x = to + kWarps * kWarpBytes<Weights> + slice * kTokens * kXRow;
#pragma unroll
    for (int i = 0; i < kXPieces; i++) {
      const int token = x_token + i * kTokensAtOnce;
      const bool there = valid && token0 + token < p.m && step0 * kStep + x_piece * 8 < p.k;
      copy_async(x + x_place(token, x_piece), x_next + i * kTokensAtOnce * p.x_stride, there);
    }
    x_next += kStageK;
    commit_copies();
  };

  float sums[kTokenTiles][2][4] = {};  // as product.h has them

#pragma unroll
  for (int i = 0; i < kStages - 1; i++) begin_copies(i);
  for (int stage = 0; stage < here.count; stage++) {
    wait_copies<kStages - 2>();
    MEMLM_SYNC_THREADS();  // this stage is there for all, and the one before is read
    begin_copies(stage + kStages - 1);
    const uint8_t* const from = memory + stage % kStages * kStage;
    const uint8_t* const of_warp = from + warp() * kWarpBytes<Weights>;
    const uint8_t* const x = from + kWarps * kWarpBytes<Weights> + slice * kTokens * kXRow;
#pragma unroll(kTokenTiles <= Weights::kUnrolledTiles ? kStageSteps : 1)
    for (int s = 0; s < kStageSteps; s++) {
      weights.unpack(of_warp, s);
      // Four scales, and offsets, of the lane's rows.
      const int slot = p.group_shift ? 0 : s;
      const int place = (slot * kPair + g * 4) * p.scale_bytes;
      float scales[4];
      load_scales(of_warp + Weights::kBytes + place, p.scale_bytes, scales);
#pragma unroll
      for (int t = 0; t < kTokenTiles; t++) {
        float products[2][4] = {};
        weights.multiply(x, t * kTokenTile, s, products);
#pragma unroll
        for (int i = 0; i < 8; i++) {
          sums[t][i / 4][i % 4] = fma_f32(scales[i / 2], products[i / 4][i % 4], sums[t][i / 4][i % 4]);
        }
        if (Weights::kOffsets && p.offsets) {
          float offsets[4], total[4] = {};  // read for each t: registers are scarcer than loads
          load_scales(of_warp + Weights::kBytes + kMostScales + place, p.scale_bytes, offsets);
          uint32_t b[2][2];
          read_x(x, t * kTokenTile + g, s * 4 + c, b);
          constexpr uint32_t one = power_of_two<T>(0), ones[4] = {one, one, one, one};
          mma<T>(total, ones, b[0]);
          mma<T>(total, ones, b[1]);
#pragma unroll
          for (int i = 0; i < 8; i++) {
            sums[t][i / 4][i % 4] = fma_f32(offsets[i / 2], total[i % 2], sums[t][i / 4][i % 4]);
          }
        }
      }
    }
  }
  wait_copies<0>();
  MEMLM_SYNC_THREADS();

  if (!add_up<kRows>(p, sums)) return;
  finish(p, here, Elements<T>(), [&](int t, int r, int j) { return sums[t][r / 2][r % 2 * 2 + j]; });
}

// ---- The launcher ----

// The kernel's parameters but what lies in the workspace.
memlm_status describe(const memlm_packed* w, int bits, const memlm_matmul_args* args, WeightOnly* p);

// Takes what else they need from the workspace, and makes rows of x ready.
memlm_status begin(const memlm_matmul_args* args, const Plan& plan, memlm_cuda_queue* queue, WeightOnly* p);

template <class Weights, int kTokenTiles>
memlm_status launch_weight_only(const typename Weights::Parameters& p, const Plan& plan) {
  const int bytes = stages_of<Weights, kTokenTiles>(plan.gpu.arch) * kStageBytes<Weights, kTokenTiles>;
  return started(
      launch(&weight_only_kernel<Weights, kTokenTiles>, plan.grid, kThreads, bytes, plan.stream, p));
}

template <class Weights>
memlm_status launch_weight_only(const typename Weights::Parameters& p, const Plan& plan) {
  switch (plan.token_tiles) {
    case 1: return launch_weight_only<Weights, 1>(p, plan);
    case 2: return launch_weight_only<Weights, 2>(p, plan);
    case 4: return launch_weight_only<Weights, 4>(p, plan);
    default: return launch_weight_only<Weights, 8>(p, plan);
  }
}

// One codec's launchers, by the type of x.
struct Launchers {
  memlm_status (*of_f16)(const WeightOnly&, const Plan&);
  memlm_status (*of_bf16)(const WeightOnly&, const Plan&);
};
template <template <class> class Codec>
constexpr Launchers kLaunchers = {&launch_weight_only<Dense<f16, Codec<f16>>>,
                                  &launch_weight_only<Dense<bf16, Codec<bf16>>>};

// Those of each kind of codes, which w<bits>_matmul.cu has.
extern const Launchers kLaunchersOf2, kLaunchersOf4, kLaunchersOfLevels, kLaunchersOf8;

// memlm_cuda_w<bits>_matmul.
memlm_status weight_only(const memlm_packed* w, int bits, const memlm_matmul_args* args,
                         memlm_cuda_queue* queue, const Launchers& launchers);

}  // namespace memlm::cuda

#endif
