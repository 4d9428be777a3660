// How keys and values of one layer lie in memory.  memlm/kv_formats.py specifies it, executably.
//
// A block holds the keys, then the values, of `tokens` tokens of one key-value head, as matrices in
// tiles of 16 rows: what the products with queries and with softmax weights read in one stream.
//
//     keys     rows are tokens,   k are channels:  tokens / 16 tiles
//     values   rows are channels, k are tokens:    dim / 16 tiles, rounded up
//
//     f32, bf16   a tile is [k][16 rows]
//     int8, int4  a tile is codes as in packed weights (memlm/formats.py): [k / 4][16 rows][4 k], or
//                 [k / 8][16 rows][k + 0..3 in low nibbles, k + 4..7 in high]; channels are padded to
//                 a multiple of 32.  After all codes f16 scales:
//                     of keys     [tokens / 16][channels / group][16 tokens]
//                     of values   [channels / group][tokens]
//                 A token has one scale for each `group` channels, and code q stands for q * scale
//                 (int4: (q - 8) * scale).  What is rounded are the channels after an orthonormal
//                 Walsh-Hadamard transform: none sticks out, and scores and sums are the same after it.
#pragma once
#include <stdint.h>

#include "formats.h"
#include "include/memlm.h"

namespace memlm {

constexpr int64_t kMostKvTokens = 256, kMostHeadDim = 512;

static inline int kv_bits(memlm_kv_type type) {
  return type == MEMLM_KV_F32 ? 32 : type == MEMLM_KV_BF16 ? 16 : type == MEMLM_KV_INT8 ? 8 : 4;
}
static inline bool kv_is_quantized(memlm_kv_type type) { return kv_bits(type) <= 8; }

struct KvBlock {
  memlm_kv_type type;
  int64_t tokens, dim;
  int64_t channels;  // padded; of f32 and bf16 keys dim, of their values `width`
  int64_t width;     // of values: a multiple of 16
  int64_t group;

  KvBlock(memlm_kv_type type, int64_t tokens, int64_t dim) : type(type), tokens(tokens), dim(dim) {
    const bool quantized = kv_is_quantized(type);
    channels = quantized ? div_up(dim, 32) * 32 : dim;
    width = quantized ? channels : div_up(dim, 16) * 16;
    group = channels % 64 ? 32 : 64;
  }
  int bits() const { return kv_bits(type); }
  int64_t groups() const { return channels / group; }
  // Bytes of a tile of keys and of values, and where values, scales and the end are.
  int64_t key_tile() const { return channels * 16 * bits() / 8; }
  int64_t value_tile() const { return tokens * 16 * bits() / 8; }
  int64_t values() const { return tokens / 16 * key_tile(); }
  int64_t key_scales() const { return values() + width / 16 * value_tile(); }
  int64_t value_scales() const { return key_scales() + tokens * groups() * 2; }
  int64_t bytes() const {
    return kv_is_quantized(type) ? value_scales() + tokens * groups() * 2 : key_scales();
  }
};

}  // namespace memlm
