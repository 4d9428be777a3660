// kv_append: keys and values of new tokens into the blocks of their sequences (csrc/kv_blocks.h), and with
// RoPE the rotation of queries and keys in the same pass.
//
// A block has the new tokens in 16 places of one sequence that begin at a multiple of 16, of one key-value
// head: of its keys, its values, or of one query head.  Codes of different tokens share bytes, but only of
// those 16, so that no other block writes to its words:
//
//     keys     a tile, of which the fifth bits of 8 tokens share a word
//     values   words of 4 tokens' bytes, or 8 tokens' nibbles, of one channel
//
// First each warp makes tokens ready in shared memory: rotated, transformed, rounded to codes.  Then all
// threads write words, neighbours side by side, and put what is new into those that have older tokens too.
//
// Arithmetic: f32, each operation rounded in the order of memlm/kv_formats.py, so that the bytes are those of
// the CPU and the reference, but for which NaN stands for a group that is not finite.  Keys and queries after
// RoPE are rounded to their dtype, as if another operation had stored them.
#include "kv.h"

namespace memlm::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / kWarp;
// Items are tiles of places: a sequence may begin and end inside one.
constexpr Deal deal() { return {1, kKvTile, 2}; }

struct Append {
  KvCache cache;
  const void *k, *v, *q;
  void* turned;
  int64_t stride, q_stride, turned_stride, angle_stride;
  int group;  // query heads of a key-value head
  const float *cos, *sin;
  const int64_t* positions;
};

// The slots of a tile that are new: from .. to - 1.  The first is token `place` of its block.
struct Slots {
  int from, to, place;
  MEMLM_DEVICE bool has(int slot) const { return slot >= from && slot < to; }
};

struct Shared {
  float *numbers, *scratch;
  uint8_t* codes;
  uint16_t* scales;
  int pitch, code_pitch;  // of tokens; they spread over the banks
};
inline int shared_bytes(const KvLayout& f) {
  return 4 * (kKvTile * (f.width + 1) + kWarps * f.width) + kKvTile * (f.width + 4) + 2 * kKvTile * f.groups;
}
MEMLM_DEVICE Shared shared_of(const KvLayout& f) {
  Shared s;
  s.pitch = f.width + 1;
  s.code_pitch = f.width + 4;
  s.numbers = shared<float>();
  s.scratch = s.numbers + kKvTile * s.pitch + warp() * f.width;
  s.codes = reinterpret_cast<uint8_t*>(s.numbers + kKvTile * s.pitch + kWarps * f.width);
  s.scales = reinterpret_cast<uint16_t*>(s.codes + kKvTile * s.code_pitch);
  return s;
}

// The elements i and i + half of a head, turned.
template <class T>
MEMLM_DEVICE void turn(const Append& a, int64_t row, const T* x, int i, int half, T* low, T* high) {
  const int64_t angle = (a.positions ? a.positions[row] : row) * a.angle_stride + i;
  const float c = a.cos[angle], s = a.sin[angle], first = to_float(x[i]), second = to_float(x[half + i]);
  *low = from_float<T>(fma_f32(first, c, -(second * s)));
  *high = from_float<T>(fma_f32(second, c, first * s));
}

// Rounds numbers [group] to codes; all lanes of a warp.  Returns the scale.
MEMLM_DEVICE f16 round_group(const float* numbers, int group, int bits, uint8_t* codes) {
  uint32_t most = 0;
  int at = 0;
  for (int i = lane(); i < group; i += kWarp) {
    const uint32_t magnitude = as_bits(numbers[i]) & 0x7fffffff;
    if (i == lane() || magnitude > most) most = magnitude, at = i;
  }
  for (int mask = kWarp / 2; mask; mask /= 2) {
    const uint32_t other = shuffle_xor(most, mask);
    const int there = shuffle_xor(at, mask);
    if (other > most || (other == most && there < at)) most = other, at = there;
  }
  const int half = 1 << (bits - 1), least = bits == 8 ? -127 : -half, zero = bits == 8 ? 0 : half;
  const f16 scale = from_float<f16>(numbers[at] / static_cast<float>(least));
  const float step = to_float(scale), inverse = step != 0 ? 1 / step : 0;
  for (int i = lane(); i < group; i += kWarp) {
    float scaled = numbers[i] * inverse;
    if (scaled != scaled) scaled = 0;
    if (scaled < static_cast<float>(least)) scaled = static_cast<float>(least);
    if (scaled > static_cast<float>(half - 1)) scaled = static_cast<float>(half - 1);
    codes[i] = static_cast<uint8_t>(round_int(scaled) + zero);
  }
  return scale;
}

// Numbers as N to a block of floats.
template <class N>
MEMLM_DEVICE void store_numbers(uint8_t* block, const KvLayout& f, bool is_value, const Slots& slots,
                                const Shared& s) {
  if (is_value) {
    for (int i = thread(); i < kKvTile * f.width; i += kThreads) {
      const int channel = i % kKvTile, slot = i / kKvTile % kKvTile, tile = i / (kKvTile * kKvTile);
      N* const to = reinterpret_cast<N*>(block + f.values + tile * f.value_tile);
      if (!slots.has(slot)) continue;
      const float number = s.numbers[slot * s.pitch + tile * kKvTile + channel];
      to[(slots.place + slot) * kKvTile + channel] = from_float<N>(number);
    }
    return;
  }
  N* const to = reinterpret_cast<N*>(block + slots.place / kKvTile * f.key_tile);
  for (int i = thread(); i < kKvTile * f.channels; i += kThreads) {
    const int slot = i % kKvTile;
    if (slots.has(slot)) to[i] = from_float<N>(s.numbers[slot * s.pitch + i / kKvTile]);
  }
}

// The word with other bits where the mask has ones.
MEMLM_DEVICE void put(uint8_t* at, uint32_t mask, uint32_t bits) {
  if (mask == 0) return;
  if (mask != kAll) bits |= load<uint32_t>(at) & ~mask;
  store(at, bits);
}

// The codes of channels k .. k + 3 of a token.
MEMLM_DEVICE uint32_t four(const Shared& s, int slot, int k) {
  return load<uint32_t>(s.codes + slot * s.code_pitch + k);
}

MEMLM_DEVICE void store_key_codes(uint8_t* block, const KvLayout& f, const Slots& slots, const Shared& s) {
  uint8_t* const tile = block + slots.place / kKvTile * f.key_tile;
  const bool bytes = f.key_bits == 8;
  const int k_of_word = bytes ? 4 : 8, run = tile_bytes(f.key_bits, kActGroup);
  for (int i = thread(); i < f.width / k_of_word * kKvTile; i += kThreads) {
    const int slot = i % kKvTile, k = i / kKvTile * k_of_word;
    if (!slots.has(slot)) continue;
    if (bytes) {
      store(tile + 4 * i, four(s, slot, k));
    } else {
      const uint32_t nibbles = (four(s, slot, k) & 0x0f0f0f0f) | (four(s, slot, k + 4) & 0x0f0f0f0f) << 4;
      store(tile + k / kActGroup * run + (k % kActGroup / 8 * kKvTile + slot) * 4, nibbles);
    }
  }
  for (int i = thread(); !bytes && i < f.width / 4 * 2; i += kThreads) {
    const int k = i / 2 * 4, first = i % 2 * 8;  // the fifth bits of 4 k of 8 tokens
    uint32_t mask = 0, bits = 0;
    for (int slot = first; slot < first + 8; slot++) {
      if (!slots.has(slot)) continue;
      // The factor brings bits 4, 12, 20, 28 side by side, to 24 .. 27.
      const uint32_t fifth = (four(s, slot, k) >> 4 & 0x01010101) * 0x01020408 >> 24 & 15;
      mask |= 15u << (slot - first) * 4;
      bits |= fifth << (slot - first) * 4;
    }
    put(tile + k / kActGroup * run + tile_bytes(4, kActGroup) + k % kActGroup * 2 + first / 2, mask, bits);
  }
}

MEMLM_DEVICE void store_value_codes(uint8_t* block, const KvLayout& f, const Slots& slots,
                                    const Shared& s) {
  const int of_word = f.value_bits == 8 ? 4 : 8, words = kKvTile / of_word;
  for (int i = thread(); i < words * f.width; i += kThreads) {
    const int channel = i % kKvTile, word = i / kKvTile % words, tile = i / kKvTile / words;
    uint32_t mask = 0, bits = 0;
    for (int j = 0; j < of_word; j++) {
      const int slot = word * of_word + j;
      if (!slots.has(slot)) continue;
      const int shift = j % 4 * 8 + j / 4 * 4;
      mask |= (f.value_bits == 8 ? 0xffu : 15u) << shift;
      bits |= static_cast<uint32_t>(s.codes[slot * s.code_pitch + tile * kKvTile + channel]) << shift;
    }
    const int at = tile * f.value_tile + ((slots.place / of_word + word) * kKvTile + channel) * 4;
    put(block + f.values + at, mask, bits);
  }
}

MEMLM_DEVICE void store_scales(uint8_t* block, const KvLayout& f, bool is_value, const Slots& slots,
                               const Shared& s) {
  uint16_t* const to = reinterpret_cast<uint16_t*>(block + (is_value ? f.value_scales : f.key_scales));
  for (int i = thread(); i < kKvTile * f.groups; i += kThreads) {
    const int slot = i % kKvTile, g = i / kKvTile;
    if (!slots.has(slot)) continue;
    to[is_value ? g * f.tokens + slots.place + slot
                : (slots.place / kKvTile * f.groups + g) * kKvTile + slot] = s.scales[slot * f.groups + g];
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) kv_append_kernel(const Append a) {
  const KvCache& c = a.cache;
  const KvLayout& f = c.layout;
  const int sequence = sequence_of(c.rows, c.sequences, deal(), block_x()), head = block_y();
  const int64_t row = c.rows[sequence], length = c.lengths[sequence];
  const int64_t before = length - (c.rows[sequence + 1] - row);
  const int64_t tile = before / kKvTile + block_x() - first_item(c.rows, sequence, deal());
  const int64_t start = tile * kKvTile;
  if (start >= length || before == length) return;
  const Slots slots = {static_cast<int>(before > start ? before - start : 0),
                       static_cast<int>(length - start < kKvTile ? length - start : kKvTile),
                       static_cast<int>(start % f.tokens)};
  const int64_t row_of_slot_0 = row + start - before;
  const int half = f.dim / 2;

  if (block_z() >= 2) {  // a query head
    const int64_t at = static_cast<int64_t>(head * a.group + block_z() - 2) * f.dim;
    for (int slot = slots.from + warp(); slot < slots.to; slot += kWarps) {
      const int64_t r = row_of_slot_0 + slot;
      T* const to = static_cast<T*>(a.turned) + r * a.turned_stride + at;
      for (int i = lane(); i < half; i += kWarp) {
        turn(a, r, static_cast<const T*>(a.q) + r * a.q_stride + at, i, half, to + i, to + half + i);
      }
    }
    return;
  }

  const bool is_value = block_z() == 1, quantized = f.key_bits <= 8;
  const int bits = is_value ? f.value_bits : f.key_bits;
  const Shared s = shared_of(f);
  for (int slot = slots.from + warp(); slot < slots.to; slot += kWarps) {
    const int64_t r = row_of_slot_0 + slot;
    const T* const x = static_cast<const T*>(is_value ? a.v : a.k) + r * a.stride + head * f.dim;
    float* const numbers = s.numbers + slot * s.pitch;
    float* const raw = quantized ? s.scratch : numbers;
    if (a.cos && !is_value) {
      for (int i = lane(); i < half; i += kWarp) {
        T low, high;
        turn(a, r, x, i, half, &low, &high);
        raw[i] = to_float(low);
        raw[half + i] = to_float(high);
      }
    } else {
      for (int i = lane(); i < f.dim; i += kWarp) raw[i] = to_float(x[i]);
    }
    for (int i = f.dim + lane(); i < f.width; i += kWarp) raw[i] = 0;
    if (!quantized) continue;
    MEMLM_SYNC_WARP();
    hadamard(raw, numbers, f.width, c.piece, c.root);
    for (int g = 0; g < f.groups; g++) {
      uint8_t* const codes = s.codes + slot * s.code_pitch + g * f.group;
      const f16 scale = round_group(numbers + g * f.group, f.group, bits, codes);
      if (lane() == 0) s.scales[slot * f.groups + g] = scale.bits;
    }
  }
  MEMLM_SYNC_THREADS();

  uint8_t* const block = block_of(c, sequence, head, start);
  if (f.key_bits == 32) return store_numbers<float>(block, f, is_value, slots, s);
  if (f.key_bits == 16) return store_numbers<bf16>(block, f, is_value, slots, s);
  store_scales(block, f, is_value, slots, s);
  if (is_value) store_value_codes(block, f, slots, s);
  else store_key_codes(block, f, slots, s);
  if (!c.tails) return;
  // Of the tokens in one place of the tail the last stays.
  Slots last = slots;
  const int64_t first_last = length - f.tokens - start;
  if (first_last > last.from) last.from = first_last < kKvTile ? static_cast<int>(first_last) : kKvTile;
  store_numbers<bf16>(tail_of(c, sequence, head), c.tail, is_value, last, s);
}

memlm_status append(const memlm_kv_pool* pool, const memlm_sequences* sequences, const void* k, const void* v,
                    int64_t stride, memlm_dtype dtype, const memlm_cuda_bounds* bounds,
                    const memlm_cuda_rope* rope, memlm_cuda_queue* queue) {
  Gpu gpu;
  MEMLM_PASS(find_gpu(dtype, &gpu));
  Append a = {};
  MEMLM_PASS(kv_cache(pool, sequences, &a.cache));
  MEMLM_PASS(check_bounds(bounds));
  const KvLayout& f = a.cache.layout;
  if (!sequences->count || !bounds->rows) return MEMLM_OK;
  MEMLM_CHECK(k && v && is_aligned(k, 2) && is_aligned(v, 2), "k, v: NULL, or not aligned to an element");
  MEMLM_CHECK(stride >= pool->kv_heads * f.dim,
              "stride: got %lld, at least kv_heads * head_dim = %lld is needed",
              static_cast<long long>(stride), static_cast<long long>(pool->kv_heads * f.dim));
  a.k = k, a.v = v, a.stride = stride;
  if (rope) {
    MEMLM_CHECK(f.dim % 2 == 0, "head_dim: got %d, RoPE takes even ones", f.dim);
    MEMLM_CHECK(rope->cos && rope->sin && rope->angle_stride >= f.dim / 2,
                "rope: cos or sin is NULL, or angle_stride less than head_dim / 2");
    MEMLM_CHECK(rope->heads >= 0 && rope->heads % pool->kv_heads == 0,
                "rope: got heads = %lld, expected a multiple of the pool's %lld",
                static_cast<long long>(rope->heads), static_cast<long long>(pool->kv_heads));
    MEMLM_CHECK(
        !rope->heads || (rope->q && rope->turned && is_aligned(rope->q, 2) && is_aligned(rope->turned, 2) &&
                         rope->q_stride >= rope->heads * f.dim && rope->turned_stride >= rope->heads * f.dim),
        "rope: q or turned is NULL or not aligned, or a stride less than heads * head_dim");
    a.q = rope->q, a.turned = rope->turned, a.q_stride = rope->q_stride,
    a.turned_stride = rope->turned_stride;
    a.group = static_cast<int>(rope->heads / pool->kv_heads);
    a.cos = rope->cos, a.sin = rope->sin, a.angle_stride = rope->angle_stride, a.positions = rope->positions;
  }
  const Grid grid = {items(bounds->rows, sequences->count, deal()), pool->kv_heads, 2 + a.group};
  const auto kernel = dtype == MEMLM_F16 ? &kv_append_kernel<f16> : &kv_append_kernel<bf16>;
  return started(launch(kernel, grid, kThreads, shared_bytes(f), queue->stream, a));
}

}  // namespace
}  // namespace memlm::cuda

using namespace memlm;

memlm_status memlm_cuda_kv_append(const memlm_kv_pool* pool, const memlm_sequences* sequences, const void* k,
                                  const void* v, int64_t stride, memlm_dtype dtype,
                                  const memlm_cuda_bounds* bounds, memlm_cuda_queue* queue) {
  return cuda::append(pool, sequences, k, v, stride, dtype, bounds, nullptr, queue);
}

memlm_status memlm_cuda_rope_kv_append(const memlm_kv_pool* pool, const memlm_sequences* sequences,
                                       const void* k, const void* v, int64_t stride, memlm_dtype dtype,
                                       const memlm_cuda_bounds* bounds, const memlm_cuda_rope* rope,
                                       memlm_cuda_queue* queue) {
  if (!rope) return cuda::fail(MEMLM_INVALID, "rope: NULL");
  return cuda::append(pool, sequences, k, v, stride, dtype, bounds, rope, queue);
}
