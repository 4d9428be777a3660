// kv_append: keys and values of new tokens into the blocks of their sequences (csrc/kv_blocks.h).
#pragma once
#include <math.h>
#include <string.h>

#include "../kv_blocks.h"
#include "attention-inl.h"
#include "hadamard-inl.h"

namespace memlm {
namespace MEMLM_ISA {

inline void store_element(char* tile, memlm_kv_type type, int64_t k, int64_t row, float x) {
  if (type == MEMLM_KV_F32)
    reinterpret_cast<float*>(tile)[k * 16 + row] = x;
  else
    reinterpret_cast<uint16_t*>(tile)[k * 16 + row] = bf16_of_float(x);
}

// `width` bits of a byte, from bit `shift` on.
inline void store_bits(char& byte, int shift, int width, int bits) {
  const int mask = ((1 << width) - 1) << shift;
  byte = static_cast<char>((byte & ~mask) | (bits << shift & mask));
}

inline void store_code(char* tile, int bits, int64_t k, int64_t row, int code) {
  if (bits == 8) {
    tile[(k / 4 * 16 + row) * 4 + k % 4] = static_cast<char>(code);
    return;
  }
  char* const run = tile + k / kActGroup * tile_bytes(bits, kActGroup);
  k %= kActGroup;
  store_bits(run[(k / 8 * 16 + row) * 4 + k % 4], k % 8 / 4 * 4, 4, code & 15);
  if (bits == 5) {
    const int64_t place = (k / 4 * 16 + row) * 4 + k % 4;
    store_bits(run[tile_bytes(4, kActGroup) + place / 8], place % 8, 1, code >> 4);
  }
}

// Rounds x [group] to codes: the number with the largest magnitude becomes the code furthest from
// zero, which has no counterpart on the other side, by the sign of the scale.  Returned is the scale,
// as f16.
inline uint16_t round_group(const float* x, int64_t group, int bits, int* codes) {
  float largest = 0;
  for (int64_t i = 0; i < group; ++i)
    if (fabsf(x[i]) > fabsf(largest) || x[i] != x[i]) largest = x[i];
  const int half = 1 << (bits - 1), least = bits == 8 ? -127 : -half, zero = bits == 8 ? 0 : half;
  alignas(64) float some[16] = {largest / static_cast<float>(least)};
  alignas(64) uint16_t rounded[16];
  f_store_f16(rounded, f_load(some));
  f_store(some, f_load_f16(rounded));
  const F inverse = f_set1(some[0] != 0 ? 1 / some[0] : 0);
  const F lowest = f_set1(static_cast<float>(least)), highest = f_set1(static_cast<float>(half - 1));
  for (int64_t i = 0; i < group; i += 16) {
    alignas(64) float whole[16];
    f_store(whole, f_from_i(f_round(f_max(f_min(f_mul(f_load(x + i), inverse), highest), lowest))));
    for (int j = 0; j < 16; ++j) codes[i + j] = static_cast<int>(whole[j]) + zero;
  }
  return rounded[0];
}

// A key, or a value, x [channels] or [width], of token t to a block of floats.
inline void store_floats(const KvBlock& b, bool is_value, int64_t t, const float* x, char* to) {
  char* const tiles = to + (is_value ? b.values() : t / 16 * b.key_tile());
  for (int64_t c = 0; c < (is_value ? b.width : b.channels); ++c)
    if (is_value)
      store_element(tiles + c / 16 * b.value_tile(), b.type, t, c % 16, x[c]);
    else
      store_element(tiles, b.type, c, t % 16, x[c]);
}

// The same, transformed already, to a block of codes.
inline void store_codes(const KvBlock& b, bool is_value, int64_t t, const float* x, char* to) {
  char* const tiles = to + (is_value ? b.values() : t / 16 * b.key_tile());
  const int bits = is_value ? b.value_bits() : b.key_bits();
  for (int64_t g = 0; g < b.groups(); ++g) {
    int codes[64];
    const uint16_t scale = round_group(x + g * b.group, b.group, bits, codes);
    const int64_t place = is_value ? g * b.tokens + t : (t / 16 * b.groups() + g) * 16 + t % 16;
    memcpy(to + (is_value ? b.value_scales() : b.key_scales()) + place * 2, &scale, 2);
    for (int64_t i = 0; i < b.group; ++i) {
      const int64_t c = g * b.group + i;
      if (is_value)
        store_code(tiles + c / 16 * b.value_tile(), bits, t, c % 16, codes[i]);
      else
        store_code(tiles, bits, c, t % 16, codes[i]);
    }
  }
}

inline void kv_append(const memlm_kv_pool& pool, const memlm_sequences& s, const void* k, const void* v,
                      int64_t stride, memlm_dtype dtype, int threads) {
  const KvBlock b(pool.type, pool.block_tokens, pool.head_dim);
  // By heads: two tokens may share a byte.
  parallel_for(s.count * pool.kv_heads, 1, threads, [&](int64_t begin, int64_t end, int) {
    alignas(64) float x[kMostHeadDim];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sequence = i / pool.kv_heads, head = i % pool.kv_heads;
      const int64_t first = s.rows[sequence], count = s.rows[sequence + 1] - first;
      const int64_t before = s.lengths[sequence] - count;
      for (int64_t n = 0; n < count; ++n) {
        const int64_t t = before + n, from = (first + n) * stride + head * b.dim;
        const int64_t block = s.tables[sequence * s.table_stride + t / b.tokens];
        char* const to = static_cast<char*>(pool.blocks) + (head * pool.count + block) * b.bytes();
        for (int part = 0; part < 2; ++part) {
          const bool is_value = part;
          for (int64_t c = 0; c < b.dim; c += 16)
            f_store(x + c, load_floats(is_value ? v : k, dtype, from + c, b.dim - c < 16 ? b.dim - c : 16));
          for (int64_t c = round_up16(b.dim); c < b.width; ++c) x[c] = 0;
          if (!kv_is_quantized(b.type)) {
            store_floats(b, is_value, t % b.tokens, x, to);
            continue;
          }
          hadamard(x, b.channels);
          store_codes(b, is_value, t % b.tokens, x, to);
          if (pool.tails) {
            const KvBlock tail = kv_tail(b);
            store_floats(tail, is_value, t % b.tokens, x,
                         static_cast<char*>(pool.tails) +
                             (head * pool.tail_count + s.tails[sequence]) * tail.bytes());
          }
        }
      }
    }
  });
}

}  // namespace MEMLM_ISA
}  // namespace memlm
