// kv_append: keys and values of new tokens into the blocks of their sequences (csrc/kv_blocks.h).
#pragma once
#include <math.h>
#include <string.h>

#include "../kv_blocks.h"
#include "attention-inl.h"
#include "hadamard-inl.h"

namespace memlm {
namespace MEMLM_ISA {

// The codes [count] of a token, from channel k on, as row `row` of a tile of keys: 4 at a time, which
// stand together.  count is a multiple of 8.
inline void store_key_codes(char* tile, int bits, int64_t row, int64_t k, int64_t count,
                            const int32_t* codes) {
  for (int64_t i = 0; i < count; i += 8, k += 8) {
    uint32_t halves[2] = {};
    for (int j = 0; j < 8; ++j)
      halves[j / 4] |= static_cast<uint32_t>(codes[i + j] & 0xff) << j % 4 * 8;
    if (bits == 8) {
      for (int h = 0; h < 2; ++h) memcpy(tile + ((k / 4 + h) * 16 + row) * 4, halves + h, 4);
      continue;
    }
    char* const run = tile + k / kActGroup * tile_bytes(bits, kActGroup);
    const int64_t eight = k % kActGroup / 8;
    const uint32_t nibbles = (halves[0] & 0x0f0f0f0f) | (halves[1] & 0x0f0f0f0f) << 4;
    memcpy(run + (eight * 16 + row) * 4, &nibbles, 4);
    for (int h = 0; bits == 5 && h < 2; ++h) {
      // The factor brings bits 4, 12, 20, 28 side by side, to 24 .. 27.
      const uint32_t fifth = (halves[h] >> 4 & 0x01010101) * 0x01020408 >> 24 & 15;
      char& both = run[tile_bytes(4, kActGroup) + ((2 * eight + h) * 16 + row) / 2];
      const int shift = row % 2 * 4;
      both = static_cast<char>((both & ~(15 << shift)) | fifth << shift);
    }
  }
}

// The codes of token t in 16 channels, to their tile of values: side by side in 32-bit lanes.
inline void store_value_codes(char* tile, int bits, int64_t t, const int32_t* codes) {
  char* const block = tile + (bits == 8 ? t / 4 : t / 8) * kBlock;
  const int shift = static_cast<int>(t % 4 * 8 + (bits == 4 ? t % 8 / 4 * 4 : 0));
  const uint32_t mask = (bits == 8 ? 0xffu : 15u) << shift;
  uint32_t lanes[16];
  memcpy(lanes, block, kBlock);
  for (int r = 0; r < 16; ++r)
    lanes[r] = (lanes[r] & ~mask) | (static_cast<uint32_t>(codes[r]) << shift & mask);
  memcpy(block, lanes, kBlock);
}

// Rounds x [group] to codes: the number with the largest magnitude becomes the code furthest from
// zero, which has no counterpart on the other side, by the sign of the scale.  Returned is the scale,
// as f16.
inline uint16_t round_group(const float* x, int64_t group, int bits, int32_t* codes) {
  I magnitudes = i_zero();
  for (int64_t i = 0; i < group; i += 16) magnitudes = i_max(magnitudes, f_magnitude_bits(f_load(x + i)));
  const int32_t most = i_reduce_max(magnitudes);
  const auto is_largest = [&](float number) {  // of one with that magnitude at least one is
    int32_t its_bits;
    memcpy(&its_bits, &number, 4);
    return (its_bits & 0x7fffffff) == most;
  };
  int64_t at = 0;
  while (!is_largest(x[at])) ++at;
  const int half = 1 << (bits - 1), least = bits == 8 ? -127 : -half, zero = bits == 8 ? 0 : half;
  alignas(64) float some[16] = {x[at] / static_cast<float>(least)};
  alignas(64) uint16_t rounded[16];
  f_store_f16(rounded, f_load(some));
  f_store(some, f_load_f16(rounded));
  const F inverse = f_set1(some[0] != 0 ? 1 / some[0] : 0);
  const F lowest = f_set1(static_cast<float>(least)), highest = f_set1(static_cast<float>(half - 1));
  for (int64_t i = 0; i < group; i += 16) {
    const I code = f_round(f_max(f_min(f_mul(f_load(x + i), inverse), highest), lowest));
    const I stored = i_add(code, i_set1(zero));
    memcpy(codes + i, &stored, sizeof stored);
  }
  return rounded[0];
}

// A key, or a value, x [channels] or [width], of token t to a block of floats.
inline void store_floats(const KvBlock& b, bool is_value, int64_t t, const float* x, char* to) {
  if (is_value) {
    const memlm_dtype dtype = b.type == MEMLM_KV_F32 ? MEMLM_F32 : MEMLM_BF16;
    for (int64_t c = 0; c < b.width; c += 16)
      store_floats(to + b.values() + c / 16 * b.value_tile(), dtype, t * 16, 16, x + c);
    return;
  }
  char* const tile = to + t / 16 * b.key_tile();
  for (int64_t c = 0, at = t % 16; c < b.channels; ++c, at += 16)
    if (b.type == MEMLM_KV_F32)
      reinterpret_cast<float*>(tile)[at] = x[c];
    else
      reinterpret_cast<uint16_t*>(tile)[at] = bf16_of_float(x[c]);
}

// The same, transformed already, to a block of codes.
inline void store_codes(const KvBlock& b, bool is_value, int64_t t, const float* x, char* to) {
  for (int64_t g = 0; g < b.groups(); ++g) {
    int32_t codes[64];
    const int bits = is_value ? b.value_bits() : b.key_bits();
    const uint16_t scale = round_group(x + g * b.group, b.group, bits, codes);
    const int64_t place = is_value ? g * b.tokens + t : (t / 16 * b.groups() + g) * 16 + t % 16;
    memcpy(to + (is_value ? b.value_scales() : b.key_scales()) + place * 2, &scale, 2);
    if (!is_value)
      store_key_codes(to + t / 16 * b.key_tile(), bits, t % 16, g * b.group, b.group, codes);
    for (int64_t i = 0; is_value && i < b.group; i += 16)
      store_value_codes(to + b.values() + (g * b.group + i) / 16 * b.value_tile(), bits, t, codes + i);
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
