// What the kernels of y = x W^T share, whatever W's codes are: how tiles, k and tokens are shared out, how
// the parts of a sum are added up, and the steps behind the product.
//
// A block has kWarps warps: rows_of() pairs of tiles beside each other, each by so many warps ("slices") as
// there are to share out its k; they add up their sums in the end.  Blocks share out k, too, where there
// would be few of them: each stores its sums, and the last to finish adds them up in the order of k.
//
// Of its pair's 32 rows and a tile of 8 tokens, lane (g, c), g = lane / 4, c = lane % 4, holds the rows
// 4 (g % 4) .. + 3 of tile g / 4, and tokens 2c and 2c + 1: element [r / 2][r % 2 * 2 + j] of its sums is
// row r, token j, which is where m16n8 products put the rows g and g + 8 of two operands.
#ifndef MEMLM_CUDA_PRODUCT_H_
#define MEMLM_CUDA_PRODUCT_H_

#include "elements.h"
#include "host.h"

namespace memlm::cuda {

constexpr int kWarps = 8, kThreads = kWarps * kWarp;
constexpr int kTile = 16, kPair = 2 * kTile;      // rows
constexpr int kStep = 32, kStageK = 2 * kStep;    // k
constexpr int kStageSteps = kStageK / kStep;
constexpr int kTokenTile = 8;

// Pairs of tiles beside each other in a block: for many tokens more, as x is read once by each block; for few
// tokens one, so that there are blocks enough without sharing out k among them.
constexpr int rows_of(int token_tiles) { return token_tiles; }
constexpr int slices_of(int token_tiles) { return kWarps / rows_of(token_tiles); }

struct Product {
  int n, m;
  int tiles, steps;  // of W's rows; of its k
  const void *bias, *residual;
  void* y;
  int64_t y_stride, residual_stride;
  bool swiglu, wide;  // wide: four features of y may be stored at once
  bool f32_y;         // whatever type bias has; no residual then
  // Blocks along y share out k: [splits][blocks][sums][kThreads] sums of each thread, and counters.
  void* partial;
  int* counters;
};

// ---- Where a thread works ----

// The tiles that warp pair `at` works on; with swiglu a gate and what it multiplies.
MEMLM_DEVICE int tile_of(const Product& p, int at, int which) {
  return p.swiglu ? at + which * (p.tiles / 2) : 2 * at + which;
}

template <int kTokenTiles>
struct Place {
  static constexpr int kRows = rows_of(kTokenTiles), kSlices = slices_of(kTokenTiles);
  static constexpr int kTokens = kTokenTiles * kTokenTile;
  int row, slice, g, c;
  int at, token0;  // the pair, the first token
  int mine;        // the tile of the lane's rows
  bool have;       // whether W has it
  int first, last, count;  // stages first .. last - 1 are the slice's; all slices go through as many

  MEMLM_DEVICE explicit Place(const Product& p) {
    row = warp() % kRows, slice = warp() / kRows, g = lane() / 4, c = lane() % 4;
    at = block_x() * kRows + row, token0 = block_z() * kTokens;
    mine = tile_of(p, at, g / 4);
    have = mine < p.tiles;
    const int all = (p.steps + kStageSteps - 1) / kStageSteps, shares = kSlices * blocks_y();
    count = (all + shares - 1) / shares;
    first = (block_y() * kSlices + slice) * count;
    last = first + count < all ? first + count : all;
  }
};

// ---- Codes, as memlm/formats.py draws them ----

// What a stage has of a tile's codes lies together in memory, in pieces of 16 bytes: those of 4 rows of a
// block of 64 bytes, which is 32 / bits k of the tile.  16 lanes copy 16 pieces side by side: the device asks
// for 64 bytes of 4 lanes at a time.  Lane (g, c) then reads those of rows 4 (g % 4) .. + 3 of tile g / 4,
// and of 8 k from 8 c on of a step: one piece; two of 8-bit codes; of 2-bit codes one that two lanes share.
template <int bits>
struct DenseCodes {
  static constexpr int kStepPieces = 4 * bits, kTilePieces = kStageSteps * kStepPieces;
  static constexpr int kPieces = bits == 8 ? 2 : 1;  // that a lane reads for a step
  static constexpr int kBytes = 2 * kTilePieces * 16;

  const uint8_t* next;  // the lane's first piece of the stage that is to be copied next
  int steps;            // 0 where W does not have the tile

  template <class Place>
  MEMLM_DEVICE DenseCodes(const uint8_t* codes, int64_t steps, const Place& place)
      : next(codes + (place.mine * steps + place.first * kStageSteps) * (bits * 64) + lane() % 16 * 16),
        steps(place.have ? static_cast<int>(steps) : 0) {}

  // Where piece j of a tile lies: turned about so that 8 lanes that read two pieces of 4 blocks meet all
  // banks.
  static MEMLM_DEVICE int place_of(int j) { return j ^ (j >> 3 & (bits / 2 - 1)) << 1; }

  // Begins to copy what the next stage, from step0 on, has; nothing where not `valid`.
  MEMLM_DEVICE void begin_copies(uint8_t* to, int step0, bool valid) {
#pragma unroll
    for (int i = 0; i < kTilePieces / 16; i++) {
      const int j = i * 16 + lane() % 16;
      const bool there = valid && step0 + j / kStepPieces < steps;
      copy_async(to + (lane() / 16 * kTilePieces + place_of(j)) * 16, next + i * 256, there);
    }
    next += kStageSteps * bits * 64;
  }

  // The lane's pieces of step s of a stage.
  MEMLM_DEVICE void read(const uint8_t* from, int s, Vec4 (&pieces)[kPieces]) const {
    const int g = lane() / 4, c = lane() % 4;
#pragma unroll
    for (int i = 0; i < kPieces; i++) {
      const int block = bits == 8 ? 2 * c + i : bits == 4 ? c : c / 2;
      const int j = g / 4 * kTilePieces + s * kStepPieces + place_of(block * 4 + g % 4);
      pieces[i] = load<Vec4>(from + j * 16);
    }
  }
};

// ---- The parts of a sum ----

// What the slices of a block have, of which `kRows` warps are one, and the blocks along y, becomes the sums
// of the threads for which this is true.  All threads of the block come, behind a barrier.
template <int kRows, class Sum, int kTiles, int kFirst, int kSecond>
MEMLM_DEVICE bool add_up(const Product& p, Sum (&sums)[kTiles][kFirst][kSecond]) {
  constexpr int kSums = kTiles * kFirst * kSecond, kSlices = kWarps / kRows, kSlots = kRows * kWarp;
  const bool first = warp() < kRows;
  auto mine = [&](int i) -> Sum& { return sums[i / (kFirst * kSecond)][i / kSecond % kFirst][i % kSecond]; };
  if (kSlices > 1) {
    Sum* const parts = shared<Sum>();
#pragma unroll
    for (int i = 0; i < kSums; i++) parts[i * kThreads + thread()] = mine(i);
    MEMLM_SYNC_THREADS();
    if (first) {
#pragma unroll
      for (int i = 0; i < kSums; i++) {
        Sum sum = 0;
        for (int s = 0; s < kSlices; s++) sum += parts[i * kThreads + thread() + s * kSlots];
        mine(i) = sum;
      }
    }
  }
  if (blocks_y() > 1) {
    Sum* const partial = static_cast<Sum*>(p.partial);
    const int64_t block = static_cast<int64_t>(block_z()) * blocks_x() + block_x();
    const int64_t blocks = static_cast<int64_t>(blocks_x()) * blocks_z();
    auto place = [&](int split, int i) { return ((split * blocks + block) * kSums + i) * kSlots + thread(); };
    if (first) {
#pragma unroll
      for (int i = 0; i < kSums; i++) partial[place(block_y(), i)] = mine(i);
      fence();
    }
    MEMLM_SYNC_THREADS();
    int* const finished = shared<int>();
    if (thread() == 0) *finished = atomic_add(p.counters + block, 1);
    MEMLM_SYNC_THREADS();
    if (*finished != blocks_y() - 1) return false;
    fence();
    if (first) {
#pragma unroll
      for (int i = 0; i < kSums; i++) mine(i) = 0;
#pragma unroll 1
      for (int split = 0; split < blocks_y(); split++) {
        const Sum* const of_split = partial + place(split, 0);
#pragma unroll
        for (int i = 0; i < kSums; i++) mine(i) += of_split[i * kSlots];
      }
    }
  }
  return first;
}

// ---- Behind the product ----

using FloatElements = Elements<float>;

MEMLM_DEVICE float silu(float x) { return x / (1 + exp2_approx(-1.4426950408889634f * x)); }

// Rounds value(t, r, j), row r and token j of token tile t, once: y <- it + bias, then swiglu, then +
// residual.
template <int kTokenTiles, class Elements, class Value>
MEMLM_DEVICE void finish(const Product& p, const Place<kTokenTiles>& place, const Elements& elements,
                         const Value& value) {
  const int n0 = place.mine * kTile + place.g % 4 * 4, columns = p.swiglu ? p.n / 2 : p.n;
#pragma unroll
  for (int i = 0; i < kTokenTiles * 2; i++) {
    const int t = i / 2, j = i % 2, token = place.token0 + t * kTokenTile + 2 * place.c + j;
    float values[4];
#pragma unroll
    for (int r = 0; r < 4; r++) {
      values[r] = value(t, r, j) + (p.bias && n0 + r < p.n ? elements.read(p.bias, n0 + r) : 0);
      if (p.swiglu) {  // the gate is in lanes 0-15, what it multiplies in the others
        const float other = shuffle_xor(values[r], 16);
        values[r] = silu(values[r]) * other;
      }
    }
    if (token >= p.m || !place.have || (p.swiglu && place.g >= 4)) continue;
    for (int r = 0; p.residual && r < 4 && n0 + r < columns; r++) {
      values[r] += elements.read(p.residual, token * p.residual_stride + n0 + r);
    }
    const int64_t at = token * p.y_stride + n0;
    if (p.wide && n0 + 4 <= columns) {
      p.f32_y ? FloatElements::write_four(p.y, at, values) : elements.write_four(p.y, at, values);
    } else {
      for (int r = 0; r < 4 && n0 + r < columns; r++) {
        p.f32_y ? FloatElements::write(p.y, at + r, values[r]) : elements.write(p.y, at + r, values[r]);
      }
    }
  }
}

// ---- The host's side ----

// How a product is launched.
struct Plan {
  int token_tiles;
  Grid grid;
  Gpu gpu;
  void* stream;
  int64_t counter_bytes, sum_bytes;  // of workspace, multiples of 256
};

// A group of 32, 64 or 128 k has 2^this steps.
inline int shift_of_group(int64_t group) { return group == kStep ? 0 : group == 2 * kStep ? 1 : 2; }

// A product's fields but what lies in the workspace.  For checked arguments.
void describe_product(const memlm_packed* w, const memlm_matmul_args* args, Product* p);

// Blocks for all rows and all tiles of tokens; they share out k where there would be too few, among at most
// so many.  sums: of a block.
memlm_status plan_blocks(const memlm_matmul_args* args, int token_tiles, int64_t row_blocks,
                         int64_t most_splits, int64_t sums, const Gpu& gpu, void* stream, Plan* plan);

// describe_product, and the plan for pairs of tiles and stages of kStageK k.
memlm_status plan_product(const memlm_packed* w, const memlm_matmul_args* args, const Gpu& gpu, void* stream,
                          Product* p, Plan* plan);

// Has a product that is described store its y [m, n] as f32.
void store_f32(Product* p);

// Gives the product its part of the workspace, the first counter_bytes + sum_bytes of it.
memlm_status begin_product(char* workspace, const Plan& plan, Product* p);

}  // namespace memlm::cuda

#endif
