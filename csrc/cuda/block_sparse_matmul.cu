// y = x W^T over blocks of 16 rows x 32 k (memlm/sparse_formats.py draws them).
//
// A warp takes one tile of W, whose 16 rows are the A operand's, and goes through the tile's blocks; tokens
// are the columns of B, as in weight_only.h.  Of a block
//
//   lane (g, c), g = lane / 4, c = lane % 4, has rows 2g and 2g + 1, and 8 k from 8c on
//
//            k 0 ... 7 | 8 ... 15 | 16 ... 23 | 24 ... 31
//   rows  0, 1  lane 0 |    1     |     2     |    3
//         2, 3       4 |    5     |     6     |    7
//         ...
//
// which make the A operands of two products of 16 k: rows 2g and 2g + 1 are the rows g and g + 8 of both; of
// the 8 k, 0-3 are those that the first product calls 2c, 2c + 1, 2c + 8, 2c + 9, and 4-7 those of the
// second.  What the lane holds of the result are 2 consecutive features of 2 tokens.
//
// Codes are multiplied as in weight_only.h.  Weights that are floats are cut into bf16 whose sum they are,
// 3 for f32, and x, if it is f16, into 2: the parts' products are exact, and summed in f32.  (Parts below
// 2^-133 are lost.)
//
// A warp copies what it reads of W, in a pipeline of its own, so that no warp waits for another.  x comes
// from global memory to registers, 16 bytes a lane and token tile, a block ahead: what warps of a
// multiprocessor read of it at about the same time is in its L1 cache.
//
// A thread block has kWarps warps: `kRows` tiles beside each other, each by kSlices warps that share out its
// blocks and add up their sums in the end.  Thread blocks share out a tile's blocks, too, where there would
// be few of them.  With swiglu the tiles of the second half of a thread block's warps are what the gates of
// the first half multiply.
#include "blocks.h"
#include "weight_only.h"

namespace memlm::cuda {
namespace {

constexpr int tiles_of(int token_tiles) { return token_tiles == 1 ? 4 : 8; }

struct BlockSparse : WeightOnly {
  const int64_t* starts;
  const int32_t* places;
};

// ---- Values: [part][row][pair of k], as the lane has them, from a block in shared memory ----

// Where 16-byte piece `piece` of a block of `bits` bits a weight lies in shared memory: turned about by which
// 8 k it is of, so that lanes that read the same rows of different k meet different banks.
template <int bits>
MEMLM_DEVICE int place_of_piece(int piece) {
  return bits < 4 ? piece : piece ^ piece / bits % 4 << 1;
}
template <int bits>
MEMLM_DEVICE const uint8_t* byte_of(const uint8_t* block, int byte) {
  return block + place_of_piece<bits>(byte / 16) * 16 + byte % 16;
}

template <class T, class Codec>
struct Codes {
  using Operand = T;
  static constexpr int kBits = Codec::kBits, kParts = 1, kBlocks = 2;
  Codec codec;

  static constexpr int stages_of(int arch) { return arch < 800 ? 2 : 4; }

  MEMLM_DEVICE explicit Codes(const WeightOnly& p) : codec(p) {}

  MEMLM_DEVICE void read(const uint8_t* block, int g, int c, uint32_t (&w)[kParts][2][4]) const {
    constexpr int kWords = kBits == 8 ? 2 : 1;
    uint32_t words[2][kWords];
#pragma unroll
    for (int i = 0; i < kWords; i++) {
      const int column = kBits == 8 ? 2 * c + i : kBits == 4 ? c : c / 2;  // of 64 bytes
      const Vec2 v = load<Vec2>(byte_of<kBits>(block, column * 64 + g * 8));
      words[0][i] = v.x, words[1][i] = v.y;
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      if (kBits == 2) words[r][0] >>= c % 2 * 4;  // the upper half of a byte has k 8 to 15
      codec.unpack(words[r], w[0][r]);
    }
  }
};

template <class T>
struct Bf16s {
  using Operand = bf16;
  static constexpr int kBits = 16, kParts = 1, kBlocks = 1;

  static constexpr int stages_of(int) { return 4; }

  MEMLM_DEVICE explicit Bf16s(const WeightOnly&) {}

  MEMLM_DEVICE void read(const uint8_t* block, int g, int c, uint32_t (&w)[kParts][2][4]) const {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      uint32_t rows[2];  // of k 2i and 2i + 1
      for (int j = 0; j < 2; j++) {
        rows[j] = load<uint32_t>(byte_of<kBits>(block, (8 * c + 2 * i + j) * 32 + g * 4));
      }
      w[0][0][i] = permute_bytes(rows[0], rows[1], 0x5410);
      w[0][1][i] = permute_bytes(rows[0], rows[1], 0x7632);
    }
  }
};

// Two numbers as so many pairs of bf16 whose sums they are.
template <int parts>
MEMLM_DEVICE void cut(float low_one, float high_one, uint32_t (&pairs)[parts]) {
#pragma unroll
  for (int i = 0; i < parts; i++) {
    pairs[i] = pair<bf16>(low_one, high_one);
    low_one -= low<bf16>(pairs[i]);
    high_one -= high<bf16>(pairs[i]);
  }
}

template <class T>
struct F32s {
  using Operand = bf16;
  static constexpr int kBits = 32, kParts = 3, kBlocks = 1;

  static constexpr int stages_of(int) { return 3; }

  MEMLM_DEVICE explicit F32s(const WeightOnly&) {}

  MEMLM_DEVICE void read(const uint8_t* block, int g, int c, uint32_t (&w)[kParts][2][4]) const {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      Vec2 rows[2];
      for (int j = 0; j < 2; j++)
        rows[j] = load<Vec2>(byte_of<kBits>(block, (8 * c + 2 * i + j) * 64 + g * 8));
      uint32_t pairs[2][kParts];
      cut(as_float(rows[0].x), as_float(rows[1].x), pairs[0]);
      cut(as_float(rows[0].y), as_float(rows[1].y), pairs[1]);
      for (int part = 0; part < kParts; part++)
        w[part][0][i] = pairs[0][part], w[part][1][i] = pairs[1][part];
    }
  }
};

// Parts of x beside W's.
template <class T, class Operand>
constexpr int kXParts = is_bf16<Operand> && !is_bf16<T> ? 2 : 1;

// Bytes of a warp's stage: codes of kBlocks blocks, 16 scales of each, and as many offsets.
template <class Values>
constexpr int kStageCodes = Values::kBlocks * Values::kBits * 64;
template <class Values>
constexpr int kStageScales = Values::kBits < 16 ? Values::kBlocks * kTile * 4 : 0;
template <class Values>
constexpr int kStageOf = kStageCodes<Values> + 2 * kStageScales<Values>;

// ---- The kernel ----

template <class T, class Values, int kTokenTiles>
__global__ void __launch_bounds__(kThreads, 2) block_sparse_kernel(const BlockSparse p) {
  using Operand = typename Values::Operand;
  constexpr int kBits = Values::kBits, kBlocks = Values::kBlocks, kStages = Values::stages_of(kArch);
  constexpr int kRows = tiles_of(kTokenTiles), kSlices = kWarps / kRows, kParts = Values::kParts;
  constexpr int kOfX = kXParts<T, Operand>;
  constexpr bool kScaled = kBits < 16;

  const int row = warp() % kRows, slice = warp() / kRows, g = lane() / 4, c = lane() % 4;
  const int token0 = block_z() * kTokenTiles * kTokenTile;
  constexpr int kHalf = kRows / 2;
  const bool upper = p.swiglu && row >= kHalf;
  const int tile =
      p.swiglu ? block_x() * kHalf + row % kHalf + (upper ? p.tiles / 2 : 0) : block_x() * kRows + row;
  const bool have = tile < (p.swiglu && !upper ? p.tiles / 2 : p.tiles);

  // Blocks first .. first + count - 1 are this warp's.
  const int64_t begin = have ? p.starts[tile] : 0, end = have ? p.starts[tile + 1] : 0;
  const int all = static_cast<int>(end - begin), shares = kSlices * blocks_y();
  const int each = (all + shares - 1) / shares, share = block_y() * kSlices + slice;
  const int left = all - share * each, count = left < 0 ? 0 : left < each ? left : each;
  const int64_t first = begin + share * each;

  uint8_t* const memory = shared<uint8_t>() + warp() * kStages * kStageOf<Values>;
  auto begin_copies = [&](int stage) {
    uint8_t* const to = memory + stage % kStages * kStageOf<Values>;
    const int64_t block = first + static_cast<int64_t>(stage) * kBlocks;
    const int blocks = count - stage * kBlocks;  // there are
    constexpr int kPieces = kBits * 4;           // of 16 bytes, of a block
#pragma unroll
    for (int i = lane(); i < kBlocks * kPieces; i += kWarp) {
      const bool there = i / kPieces < blocks;
      const int64_t offset = there ? block * kBits * 64 + i * 16 : 0;
      copy_async(to + (i / kPieces * kPieces + place_of_piece<kBits>(i % kPieces)) * 16, p.codes + offset,
                 there);
    }
    if (kScaled && lane() < kBlocks * p.scale_bytes) {
      const bool there = lane() / p.scale_bytes < blocks;
      const int64_t offset = there ? (block * p.scale_bytes + lane()) * 16 : 0;
      uint8_t* const scales = to + kStageCodes<Values> + lane() * 16;
      copy_async(scales, p.scales + offset, there);
      if (p.offsets) copy_async(scales + kStageScales<Values>, p.offsets + offset, there);
    }
    commit_copies();
  };

  // The places of 32 blocks, and of the 32 after them.
  auto read_place = [&](int i) { return i < count ? p.places[first + i] : -1; };
  int places = read_place(lane()), next_places = read_place(kWarp + lane());
  auto read_x = [&](int i, Vec4(&x)[kTokenTiles]) {
    const int place = shuffle(i / kWarp % 2 ? next_places : places, i % kWarp);
    const unsigned k = static_cast<unsigned>(place) * kBlockK + 8 * c;
    for (int t = 0; t < kTokenTiles; t++) {
      const int token = token0 + t * kTokenTile + g;
      x[t] = {0, 0, 0, 0};
      if (place >= 0 && k < static_cast<unsigned>(p.k) && token < p.m) {
        x[t] = load<Vec4>(static_cast<const T*>(p.x) + token * p.x_stride + k);
      }
    }
  };

  float sums[kTokenTiles][2][2] = {};  // [][feature][token]
  const Values values(p);
  const uint32_t ones[4] = {pair<T>(1, 1), pair<T>(1, 1), pair<T>(1, 1), pair<T>(1, 1)};

#pragma unroll
  for (int i = 0; i < kStages - 1; i++) begin_copies(i);
  Vec4 x[kTokenTiles];
  read_x(0, x);
  for (int i = 0; i < count; i++) {
    const int stage = i / kBlocks;
    if (i % kBlocks == 0) {
      wait_copies<kStages - 2>();
      MEMLM_SYNC_WARP();  // this stage is there for all lanes, and the one before is read
      begin_copies(stage + kStages - 1);
    }
    // After the first half of 64 the next 64 begin, and likewise after the second.
    if (i % kWarp == 0 && i) (i / kWarp % 2 ? places : next_places) = read_place(i + kWarp + lane());
    Vec4 next[kTokenTiles];
    read_x(i + 1, next);

    const uint8_t* const from = memory + stage % kStages * kStageOf<Values>;
    uint32_t w[kParts][2][4];
    values.read(from + i % kBlocks * (kBits * 64), g, c, w);
    float scales[2] = {1, 1}, offsets[2] = {};
    auto two = [&](const uint8_t* array, float(&to)[2]) {
      const int place = (i % kBlocks * kTile + 2 * g) * p.scale_bytes;
      if (p.scale_bytes == 2) {
        const uint32_t v = load<uint32_t>(array + place);
        to[0] = low<f16>(v), to[1] = high<f16>(v);
      } else {
        const Vec2 v = load<Vec2>(array + place);
        to[0] = as_float(v.x), to[1] = as_float(v.y);
      }
    };
    if (kScaled) two(from + kStageCodes<Values>, scales);
    if (kScaled && p.offsets) two(from + kStageCodes<Values> + kStageScales<Values>, offsets);
#pragma unroll
    for (int t = 0; t < kTokenTiles; t++) {
      const uint32_t xs[4] = {x[t].x, x[t].y, x[t].z, x[t].w};
      uint32_t b[kOfX][4];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        if constexpr (kOfX == 1) {
          b[0][j] = xs[j];
        } else {
          uint32_t pairs[kOfX];
          cut(low<T>(xs[j]), high<T>(xs[j]), pairs);
          for (int part = 0; part < kOfX; part++) b[part][j] = pairs[part];
        }
      }
      float product[4] = {}, total[4] = {};
#pragma unroll
      for (int part = kParts * kOfX - 1; part >= 0; part--) {  // from the smallest on
        const uint32_t(&ws)[2][4] = w[part / kOfX];
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const uint32_t a[4] = {ws[0][2 * h], ws[1][2 * h], ws[0][2 * h + 1], ws[1][2 * h + 1]};
          const uint32_t bs[2] = {b[part % kOfX][2 * h], b[part % kOfX][2 * h + 1]};
          mma<Operand>(product, a, bs);
          if (kScaled && p.offsets) mma<Operand>(total, ones, bs);
        }
      }
#pragma unroll
      for (int r = 0; r < 2; r++) {
        for (int j = 0; j < 2; j++) {
          sums[t][r][j] += scales[r] * product[2 * r + j];
          if (kScaled && p.offsets) sums[t][r][j] += offsets[r] * total[j];
        }
      }
      x[t] = next[t];
    }
  }
  wait_copies<0>();
  MEMLM_SYNC_THREADS();

  const bool mine = add_up<kRows>(p, sums) && have;
  const T* const bias = static_cast<const T*>(p.bias);
  const int n = tile * kTile + 2 * g;
  if (mine && bias) {
    for (int r = 0; r < 2; r++) {
      if (n + r >= p.n) continue;
#pragma unroll
      for (int i = 0; i < kTokenTiles * 2; i++) sums[i / 2][r][i % 2] += to_float(bias[n + r]);
    }
  }
  if (p.swiglu) {
    constexpr int kSums = kTokenTiles * 4;
    float* const factors = shared<float>() + thread() % (kHalf * kWarp);
    MEMLM_SYNC_THREADS();  // add_up has read what lay there
    if (mine && upper) {
#pragma unroll
      for (int i = 0; i < kSums; i++) factors[i * kHalf * kWarp] = sums[i / 4][i / 2 % 2][i % 2];
    }
    MEMLM_SYNC_THREADS();
    if (mine && !upper) {
#pragma unroll
      for (int i = 0; i < kSums; i++) {
        float& sum = sums[i / 4][i / 2 % 2][i % 2];
        sum = silu(sum) * factors[i * kHalf * kWarp];
      }
    }
  }
  if (!mine || upper) return;
  const T* const residual = static_cast<const T*>(p.residual);
  const int columns = p.swiglu ? p.n / 2 : p.n;
#pragma unroll
  for (int i = 0; i < kTokenTiles * 2; i++) {
    const int t = i / 2, j = i % 2, token = token0 + t * kTokenTile + 2 * c + j;
    if (token >= p.m) continue;
    float two[2] = {sums[t][0][j], sums[t][1][j]};
    for (int r = 0; residual && r < 2 && n + r < columns; r++) {
      two[r] += to_float(residual[token * p.residual_stride + n + r]);
    }
    T* const y = static_cast<T*>(p.y) + token * p.y_stride + n;
    if (p.wide && n + 2 <= columns) {
      store(y, pair<T>(two[0], two[1]));
    } else {
      for (int r = 0; r < 2 && n + r < columns; r++) y[r] = from_float<T>(two[r]);
    }
  }
}

// ---- The launcher ----

template <class T, class Values>
memlm_status launch_block_sparse(const BlockSparse& p, const Plan& plan) {
  const int bytes = kWarps * Values::stages_of(plan.gpu.arch) * kStageOf<Values>;
  return started(
      launch(plan.token_tiles == 1 ? &block_sparse_kernel<T, Values, 1> : &block_sparse_kernel<T, Values, 4>,
             plan.grid, kThreads, bytes, plan.stream, p));
}

template <class T>
memlm_status launch_block_sparse_of(const memlm_packed* w, int bits, const BlockSparse& p, const Plan& plan) {
  switch (bits) {
    case 2: return launch_block_sparse<T, Codes<T, Integers<T, 2>>>(p, plan);
    case 4: return w->levels ? launch_block_sparse<T, Codes<T, Lookup<T>>>(p, plan)
                             : launch_block_sparse<T, Codes<T, Integers<T, 4>>>(p, plan);
    case 8: return launch_block_sparse<T, Codes<T, Bytes<T>>>(p, plan);
    case 16: return launch_block_sparse<T, Bf16s<T>>(p, plan);
    default: return launch_block_sparse<T, F32s<T>>(p, plan);
  }
}

}  // namespace

memlm_status check_blocks(const memlm_packed* w, int bits) {
  MEMLM_CHECK(w && w->pattern == MEMLM_BLOCKS, "w: NULL, or its pattern is not blocks");
  MEMLM_CHECK(w->starts, "starts: NULL");
  MEMLM_CHECK(w->group == kBlockK, "group: got %lld, accepted for blocks is 32",
              static_cast<long long>(w->group));
  MEMLM_CHECK(are_floats(bits) || bits == 2 || bits == 4 || bits == 8,
              "bits: got %d, accepted are 2, 4, 8, 16 and 32", bits);
  MEMLM_CHECK(!are_floats(bits) || (!w->scales && !w->offsets && !w->levels),
              "w: floats have no scales, offsets or levels");
  return check_values(w, are_floats(bits) ? 4 : bits);
}

Blocks blocks_of(const memlm_packed* w, int bits) {
  Blocks blocks = {static_cast<const uint8_t*>(w->codes), static_cast<const uint8_t*>(w->scales),
                   static_cast<const uint8_t*>(w->offsets), bits, bytes_of(w->scale_dtype)};
  const int zero = w->offsets ? 0 : bits == 4 ? 8 : 1;
  for (int q = 0; q < 16; q++) blocks.numbers[q] = w->levels ? w->levels[q] : static_cast<float>(q - zero);
  return blocks;
}

}  // namespace memlm::cuda

using namespace memlm;
using namespace memlm::cuda;

memlm_status memlm_cuda_block_sparse_matmul(const memlm_packed* w, int bits, const memlm_matmul_args* args,
                                            memlm_cuda_queue* queue) {
  MEMLM_PASS(check_blocks(w, bits));
  MEMLM_PASS(check_matmul(w, args));
  Gpu gpu;
  MEMLM_PASS(find_gpu(args->dtype, &gpu));
  if (are_floats(bits) && gpu.arch < 800) {
    return fail(MEMLM_UNSUPPORTED, "bits: got %d on compute capability 7.5; accepted are 2, 4 and 8", bits);
  }
  BlockSparse p = {};
  MEMLM_PASS(describe(w, bits, args, &p));
  p.starts = w->starts;
  p.places = static_cast<const int32_t*>(w->places);
  if (!args->m) return MEMLM_OK;

  const int token_tiles = args->m <= 8 ? 1 : 4, rows = tiles_of(token_tiles);
  const int64_t row_blocks = p.swiglu ? ceil_div(p.tiles / 2, rows / 2) : ceil_div(p.tiles, rows);
  // While each warp still has 8 blocks, if half of them are stored.
  const int64_t most_splits = p.steps / (16 * (kWarps / rows));
  Plan plan;
  MEMLM_PASS(plan_blocks(args, token_tiles, row_blocks, most_splits, token_tiles * 4 * rows * kWarp, gpu,
                         queue->stream, &plan));
  MEMLM_PASS(begin(args, plan, queue, &p));
  return args->dtype == MEMLM_F16 ? launch_block_sparse_of<f16>(w, bits, p, plan)
                                  : launch_block_sparse_of<bf16>(w, bits, p, plan);
}
