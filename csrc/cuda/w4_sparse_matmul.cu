// y = x W^T over 4-bit weights of which two in four are stored, or any (memlm/sparse_formats.py draws them):
// weight_only.h's kernel over weights that are put where they belong in registers.
//
// Rows are weight_only.h's: lane (g, c) has rows 4 (g % 4) .. + 3 of tile g / 4.
//
// Two in four, from 8.0 on: the sparse tensor cores take what is stored as it is, and skip the rest.  Of a
// step of 32 k, 8 times 4, the lane has what is stored of k 4c .. 4c + 3 and 16 + 4c .. + 3: a byte of each
// row.  Rows 4 (g % 4) and + 1 go into the first product, the other two into the second; the lanes with
// c = 0, 1 tell where elements stand in the first, those with c = 2, 3 in the second, each of 16 k.
//
// All else is expanded: of the 4 k that a row's byte (or up to 4 nibbles) are of, the lane makes two pairs
// with zeros where nothing is stored, 8 k from 8c on, and multiplies as weight_only.h does.
//
// Where the codes of 16 rows x 4 k begin, in an unstructured matrix, follows from the bits before them.  A
// warp counts them twice: those before its slice of k as it begins, and those of a stage, a lane for each
// 16 x 4 of both tiles, as it begins to copy the stage's codes; bits are read a stage ahead.
#include "compressed.h"
#include "weight_only.h"

namespace memlm::cuda {
namespace {

constexpr int kStepFours = kStep / kFour, kStageFours = kStageK / kFour;
constexpr int kPlacesBytes = 2 * kStageFours * kPlaceBytes;  // of a warp's stage

struct Compressed : WeightOnly {
  const int64_t* starts;
  const uint8_t* places;
};

// Where the places of a stage's 4 k lie: [step][tile][4 k].
MEMLM_DEVICE int place_offset(int s, int tile, int four) {
  return ((s * 2 + tile) * kStepFours + four) * kPlaceBytes;
}

// ---- Codes to numbers: the two nibbles of each byte of a word, the low one first, as a pair ----

template <class T>
struct Numbers {
  uint32_t one, minus_magic;

  MEMLM_DEVICE explicit Numbers(const WeightOnly& p)
      : one(pair<T>(1, 1)), minus_magic(pair<T>(-(kMagicValue<T> + p.zero), -(kMagicValue<T> + p.zero))) {}

  MEMLM_DEVICE void unpack(uint32_t word, uint32_t (&pairs)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint32_t both = permute_bytes(word, word >> 4, 0x4400 + 0x1111 * i);
      pairs[i] = fma_pair<T>(select_bits<0x000f000f, kMagic<T>>(both), one, minus_magic);
    }
  }
};

template <class T>
struct LookedUp {
  Lookup<T> lookup;

  MEMLM_DEVICE explicit LookedUp(const WeightOnly& p) : lookup(p) {}

  MEMLM_DEVICE void unpack(uint32_t word, uint32_t (&pairs)[4]) const {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const uint32_t low = lookup.bytes_at(lookup.levels.low, word >> 16 * i);
      const uint32_t high = lookup.bytes_at(lookup.levels.high, word >> 16 * i);
      pairs[2 * i] = permute_bytes(low, high, 0x5140);
      pairs[2 * i + 1] = permute_bytes(low, high, 0x7362);
    }
  }
};

// Four numbers, of which those that stand where `mask` has a bit come from `stored` in order; others are 0.
MEMLM_DEVICE void expand(uint32_t mask, uint32_t stored0, uint32_t stored1, uint32_t& pair0,
                         uint32_t& pair1) {
  const uint32_t here = mask * 0x00204081u & 0x01010101u;  // a byte for each of the 4
  const uint32_t before = here * 0x01010100u;              // how many stand before each
  const uint32_t select = 0x10101010u + before * 0x22u;    // the two bytes of the number that each takes
  const uint32_t kept = here * 0xffu;
  pair0 = permute_bytes(stored0, stored1, select) & permute_bytes(kept, 0, 0x1100);
  pair1 = permute_bytes(stored0, stored1, select >> 16) & permute_bytes(kept, 0, 0x3322);
}

// ---- Two in four ----

// What of a pair of tiles comes into a stage: codes, [step][4 k][tile][16 rows], then places.
template <class Element, class Codec>
struct TwoOfFour {
  using T = Element;
  using Parameters = Compressed;
  static constexpr bool kOffsets = false;
  static constexpr int kUnrolledTiles = 2;
  static constexpr int kCodesBytes = 2 * kStageFours * kTile, kBytes = kCodesBytes + kPlacesBytes;

  static constexpr int stages_of(int arch) { return arch < 800 ? 2 : 4; }

  const Codec codec;
  uint32_t w[4][4];  // [feature][pair of k]; for the sparse product a0, a1, as mma_sparse takes them
  uint32_t where;    // and where those stand

  template <class Here>
  MEMLM_DEVICE TwoOfFour(const Compressed& p, const Here&) : codec(p) {}

  template <class Here>
  MEMLM_DEVICE void begin_copies(const Compressed& p, const Here& here, uint8_t* to, int step0, bool valid) {
    const int tile = tile_of(p, here.at, lane() % 2);
    const bool have = valid && tile < p.tiles;
    const int64_t fours = static_cast<int64_t>(p.steps) * kStepFours;  // of a tile
    const int64_t tile_fours = tile * fours + static_cast<int64_t>(step0) * kStepFours;
    constexpr int kPieces = 2 * kStageFours;
    static_assert(kPieces == kWarp, "a piece for each lane");
    const bool there = have && step0 + lane() / 2 / kStepFours < p.steps;
    copy_async(to + lane() * 16, p.codes + (there ? (tile_fours + lane() / 2) * kTile : 0), there);
    if (lane() < kPieces / 2) {  // places of two 4 k are a piece
      const int four = lane() / 2 * 2, s = four / kStepFours;
      const bool in = have && step0 + s < p.steps;
      copy_async(to + kCodesBytes + place_offset(s, lane() % 2, four % kStepFours),
                 p.places + (in ? (tile_fours + four) * kPlaceBytes : 0), in);
    }
  }

  MEMLM_DEVICE void unpack(const uint8_t* from, int s) {
    const int g = lane() / 4, c = lane() % 4, tile = g / 4, in_tile = g % 4;
    auto codes = [&](int four) {
      return load<uint32_t>(from + ((s * kStepFours + four) * 2 + tile) * kTile + in_tile * 4);
    };
    auto places = [&](int four) { return load<Vec2>(from + kCodesBytes + place_offset(s, tile, four)); };
    if constexpr (kArch >= 800) {
      uint32_t first[4], second[4];  // [row]: of k 4c on, and of 16 + 4c on
      codec.unpack(codes(c), first);
      codec.unpack(codes(4 + c), second);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        w[i][0] = first[2 * i], w[i][1] = first[2 * i + 1];
        w[i][2] = second[2 * i], w[i][3] = second[2 * i + 1];
      }
      // Byte in_tile of each 4 k's two words has rows 4 in_tile and + 2, or + 1 and + 3.
      uint32_t even[2], odd[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const Vec2 v0 = places(c % 2 * 4 + 2 * i), v1 = places(c % 2 * 4 + 2 * i + 1);
        const uint32_t select = 0x40 + 0x11 * in_tile;
        even[i] = permute_bytes(v0.x, v1.x, select), odd[i] = permute_bytes(v0.y, v1.y, select);
      }
      auto packed = [&](const uint32_t(&bytes)[2]) {  // the 4 nibbles of the product's row: in bytes 0 and 2
        const uint32_t nibbles = permute_bytes(bytes[0], bytes[1], 0x5410) >> c / 2 * 4 & 0x0f0f0f0f;
        return nibbles | nibbles >> 4;
      };
      where = permute_bytes(packed(even), packed(odd), 0x6420);
    } else {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        uint32_t stored[4];
        codec.unpack(codes(2 * c + i), stored);
        const Vec2 v = places(2 * c + i);
#pragma unroll
        for (int r = 0; r < 4; r++) {
          const uint32_t place = place_of_row(v, 4 * in_tile + r);
          const uint32_t mask = 1u << (place & 3) | 1u << (place >> 2 & 3);
          expand(mask, stored[r], 0, w[r][2 * i], w[r][2 * i + 1]);
        }
      }
    }
  }

  MEMLM_DEVICE void multiply(const uint8_t* x, int token0, int s, float (&products)[2][4]) const {
    if constexpr (kArch >= 800) {
      uint32_t b[4];
      load_matrices(b, x + x_place(token0 + lane() % 8, s * 4 + lane() / 8));
      mma_sparse<T, 0>(products[0], w[0], b, where);
      mma_sparse<T, 1>(products[1], w[1], b, where);
    } else {
      uint32_t b[2][2];
      read_x(x, token0 + lane() / 4, s * 4 + lane() % 4, b);
      cuda::multiply<T>(w, b, products);
    }
  }
};

// ---- Any ----

// What of a pair of tiles comes into a stage: codes of each tile, as they lie in memory from a multiple of 16
// bytes on; places; and at which byte of the tile's codes each 16 x 4 begins, [step][tile][4 k].
template <class Element, class Codec>
struct Unstructured {
  using T = Element;
  using Parameters = Compressed;
  static constexpr bool kOffsets = false;
  static constexpr int kUnrolledTiles = 2;
  // From anywhere among 16 bytes on; and the words that are loaded behind the last code, but not used.
  static constexpr int kBehind = 12;
  static constexpr int kTileCodes = round_up(15 + kStageK * kTile / 2 + kBehind, 16);
  static constexpr int kCodesBytes = 2 * kTileCodes;
  static constexpr int kBytes = kCodesBytes + kPlacesBytes + 2 * kStageFours * 4;

  static constexpr int stages_of(int arch) { return arch < 800 ? 2 : 3; }

  const Codec codec;
  uint32_t w[4][4];  // [feature][pair of k]
  // Of the lane's tile, which is lane / 16 of the pair: the byte of codes at which the next stage begins, and
  // the places of its (lane % 16)-th 4 k.
  int64_t at;
  Vec2 bits;

  template <class Here>
  MEMLM_DEVICE Unstructured(const Compressed& p, const Here& here) : codec(p), at(0), bits{0, 0} {
    const int tile = tile_of(p, here.at, lane() / 16), step0 = here.first * kStageSteps;
    const bool have = tile < p.tiles && step0 < p.steps;
    int bytes = 0;
    if (have) {
      for (int i = lane() % 16; i < step0 * kStepFours; i += 16) bytes += code_bytes(read_bits(p, tile, i));
      at = p.starts[tile];
    }
    for (int mask = 1; mask < 16; mask *= 2) bytes += shuffle_xor(bytes, mask);
    at += bytes;
    if (have) bits = read_stage_bits(p, tile, step0);
  }

  static MEMLM_DEVICE Vec2 read_bits(const Compressed& p, int tile, int four) {
    const int64_t fours = static_cast<int64_t>(p.steps) * kStepFours;
    return load<Vec2>(p.places + (tile * fours + four) * kPlaceBytes);
  }
  static MEMLM_DEVICE Vec2 read_stage_bits(const Compressed& p, int tile, int step0) {
    const int four = step0 * kStepFours + lane() % 16;
    return four < p.steps * kStepFours ? read_bits(p, tile, four) : Vec2{0, 0};
  }

  template <class Here>
  MEMLM_DEVICE void begin_copies(const Compressed& p, const Here& here, uint8_t* to, int step0, bool valid) {
    const int tile = lane() / 16, four = lane() % 16;
    const Vec2 now = valid ? bits : Vec2{0, 0};
    const int of_pair = tile_of(p, here.at, tile);
    bits = of_pair < p.tiles ? read_stage_bits(p, of_pair, step0 + kStageSteps) : Vec2{0, 0};
    const int bytes = code_bytes(now);
    int end = bytes;  // of those up to this one
    for (int by = 1; by < 16; by *= 2) {
      const int before = shuffle_up(end, by);
      if (four >= by) end += before;
    }
    const int place = place_offset(four / kStepFours, tile, four % kStepFours);
    store(to + kCodesBytes + place, now);
    store(to + kCodesBytes + kPlacesBytes + place / 2, static_cast<int>(at % 16) + end - bytes);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int64_t from = shuffle(at, 16 * i);
      const int length = static_cast<int>(from % 16) + shuffle(end, 16 * i + 15);
      const uint8_t* const codes = p.codes + from / 16 * 16;
      for (int j = lane() * 16; j < length + kBehind; j += kWarp * 16)
        copy_async(to + i * kTileCodes + j, codes + j);
    }
    at += shuffle(end, lane() | 15);
  }

  MEMLM_DEVICE void unpack(const uint8_t* from, int s) {
    const int g = lane() / 4, c = lane() % 4, tile = g / 4, in_tile = g % 4;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int place = place_offset(s, tile, 2 * c + i);
      const Vec2 v = load<Vec2>(from + kCodesBytes + place);
      const int begin = load<int>(from + kCodesBytes + kPlacesBytes + place / 2);
      // The lane's 16 bits, and the nibbles before them.
      const uint32_t half = in_tile / 2 ? v.y : v.x, mask = half >> in_tile % 2 * 16 & 0xffff;
      const uint32_t before = in_tile % 2 ? half & 0xffff : 0;
      const int nibble = 2 * begin + count_bits(before) + (in_tile / 2 ? count_bits(v.x) : 0);
      const uint8_t* const words = from + tile * kTileCodes + nibble / 8 * 4;
      const int shift = nibble % 8 * 4;
      const uint64_t two = load<uint32_t>(words) | static_cast<uint64_t>(load<uint32_t>(words + 4)) << 32;
      uint64_t stored = two >> shift | static_cast<uint64_t>(load<uint32_t>(words + 8)) << 1 << (63 - shift);
#pragma unroll
      for (int r = 0; r < 4; r++) {
        const uint32_t of_row = mask >> 4 * r & 15;
        uint32_t pairs[4];
        codec.unpack(static_cast<uint32_t>(stored) & 0xffff, pairs);
        expand(of_row, pairs[0], pairs[1], w[r][2 * i], w[r][2 * i + 1]);
        stored >>= 4 * count_bits(of_row);
      }
    }
  }

  MEMLM_DEVICE void multiply(const uint8_t* x, int token0, int s, float (&products)[2][4]) const {
    uint32_t b[2][2];
    read_x(x, token0 + lane() / 4, s * 4 + lane() % 4, b);
    cuda::multiply<T>(w, b, products);
  }
};

template <template <class, class> class Weights, class T>
memlm_status launch_sparse(const memlm_packed* w, const Compressed& p, const Plan& plan) {
  return w->levels ? launch_weight_only<Weights<T, LookedUp<T>>>(p, plan)
                   : launch_weight_only<Weights<T, Numbers<T>>>(p, plan);
}

template <class T>
memlm_status launch_sparse(const memlm_packed* w, const Compressed& p, const Plan& plan) {
  return w->pattern == MEMLM_TWO_OF_FOUR ? launch_sparse<TwoOfFour, T>(w, p, plan)
                                         : launch_sparse<Unstructured, T>(w, p, plan);
}

}  // namespace

memlm_status check_compressed(const memlm_packed* w) {
  MEMLM_CHECK(w && (w->pattern == MEMLM_TWO_OF_FOUR || w->pattern == MEMLM_UNSTRUCTURED),
              "w: NULL, or its pattern is neither 2:4 nor unstructured");
  MEMLM_CHECK(w->codes && w->scales && w->places, "w: its codes, scales or places are NULL");
  MEMLM_CHECK(w->pattern == MEMLM_TWO_OF_FOUR || w->starts, "starts: NULL");
  MEMLM_CHECK(!w->offsets, "w: sparse 4-bit weights have no offsets");
  MEMLM_CHECK(is_aligned(w->places, 16), "w: its places must be 16-byte aligned");
  return check_values(w, 4);
}

}  // namespace memlm::cuda

using namespace memlm;
using namespace memlm::cuda;

memlm_status memlm_cuda_w4_sparse_matmul(const memlm_packed* w, const memlm_matmul_args* args,
                                         memlm_cuda_queue* queue) {
  MEMLM_PASS(check_compressed(w));
  MEMLM_PASS(check_matmul(w, args));
  Gpu gpu;
  MEMLM_PASS(find_gpu(args->dtype, &gpu));
  Compressed p = {};
  MEMLM_PASS(describe(w, 4, args, &p));
  p.starts = w->starts;
  p.places = static_cast<const uint8_t*>(w->places);
  if (!args->m) return MEMLM_OK;
  Plan plan;
  MEMLM_PASS(plan_product(w, args, gpu, queue->stream, &p, &plan));
  MEMLM_PASS(begin(args, plan, queue, &p));
  return args->dtype == MEMLM_F16 ? launch_sparse<f16>(w, p, plan) : launch_sparse<bf16>(w, p, plan);
}
