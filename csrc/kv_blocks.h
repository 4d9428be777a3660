// How keys and values of one layer lie in memory.  memlm/kv_formats.py specifies it, executably.
//
// A block holds the keys, then the values, of `tokens` tokens of one key-value head, as matrices in
// tiles of 16 rows: what the products with queries and with softmax weights read in one stream.
//
//     keys     rows are tokens,   k are channels:  tokens / 16 tiles
//     values   rows are channels, k are tokens:    dim / 16 tiles, rounded up
//
//     f32, bf16   a tile is [k][16 rows]
//     int8        a tile is codes as in packed weights (memlm/formats.py): [k / 4][16 rows][4 k]
//     int4        values likewise: [k / 8][16 rows][k + 0..3 in low nibbles, k + 4..7 in high]
//                 keys have 5 bits: for each 32 k the same nibbles, then their fifth bits, as
//                 [k / 4][16 rows * 4 k] bits, the lowest first
//
// Channels of int8 and int4 are padded to a multiple of 32.  After all codes stand f16 scales, one for
// each token and `group` channels:
//
//     of keys     [tokens / 16][channels / group][16 tokens]
//     of values   [channels / group][tokens]
//
// Code q stands for (q - zero) * scale: zero is 0 for 8 bits, 8 for 4, 16 for 5.  What is rounded are
// the channels after an orthonormal Walsh-Hadamard transform: none sticks out, and scores and sums are
// the same after it.  A token is rounded by itself, so that what is stored depends on nothing else.
// (Measured on SmolLM2: keys in 4 bits cost 5 % of perplexity, in 5 bits 1.3 %, as much as 4 bits for
// each channel of 32 tokens, which would have to be waited for.)
//
// An int4 cache keeps the newest block of each sequence, its tail, as bf16 as well, of the transformed
// and padded channels.  Queries in that block read it there, which brings 1.3 % down to 0.1 %.
#pragma once
#include <stdint.h>

#include "formats.h"
#include "include/memlm.h"

namespace memlm {

constexpr int64_t kMostKvTokens = 256, kMostHeadDim = 512;

static inline int kv_bits(memlm_kv_type type, bool keys) {
  return type == MEMLM_KV_F32 ? 32 : type == MEMLM_KV_BF16 ? 16 : type == MEMLM_KV_INT8 ? 8 : keys ? 5 : 4;
}
static inline bool kv_is_quantized(memlm_kv_type type) { return type >= MEMLM_KV_INT8; }

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
  int key_bits() const { return kv_bits(type, true); }
  int value_bits() const { return kv_bits(type, false); }
  int64_t groups() const { return channels / group; }
  // Bytes of a tile of keys and of values, and where values, scales and the end are.
  int64_t key_tile() const { return channels * 16 * key_bits() / 8; }
  int64_t value_tile() const { return tokens * 16 * value_bits() / 8; }
  int64_t values() const { return tokens / 16 * key_tile(); }
  int64_t key_scales() const { return values() + width / 16 * value_tile(); }
  int64_t value_scales() const { return key_scales() + tokens * groups() * 2; }
  int64_t bytes() const {
    return kv_is_quantized(type) ? value_scales() + tokens * groups() * 2 : key_scales();
  }
};

static inline KvBlock kv_tail(const KvBlock& b) { return {MEMLM_KV_BF16, b.tokens, b.channels}; }
static inline bool kv_has_tails(memlm_kv_type type) { return type == MEMLM_KV_INT4; }

}  // namespace memlm
