// Tiles of keys and values in shared memory, as the A operands that paged_attention.cu draws, and what they
// are multiplied by.
#ifndef MEMLM_CUDA_PAGED_TILES_H_
#define MEMLM_CUDA_PAGED_TILES_H_

#include <type_traits>

#include "kv.h"

namespace memlm::cuda::paged {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
using M = f16;
#elif !defined(__CUDACC__) && MEMLM_EMULATED_ARCH < 800
using M = f16;
#else
using M = bf16;
#endif

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
    if (std::is_same_v<M, f16>) {
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

}  // namespace memlm::cuda::paged

#endif
