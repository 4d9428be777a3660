// paged_attention: over keys and values in blocks, read as they are stored (csrc/kv_blocks.h).
//
// Quantised blocks are read by integer products (per_row-inl.h): queries are rounded to int8, with one
// scale for each row and group of channels; so are softmax weights times the scales of the values, with
// one for each row and block.
#pragma once
#include "attend-inl.h"
#include "attention-inl.h"
#include "hadamard-inl.h"
#include "kv_append-inl.h"
#include "per_row-inl.h"
#include "w4_matmul-inl.h"
#include "w8_matmul-inl.h"

namespace memlm {
namespace MEMLM_ISA {

struct PagedCall {
  const memlm_kv_pool& pool;
  const memlm_sequences& sequences;
  const memlm_paged_attention_args& args;
  KvBlock block;
};

struct PagedPassage {
  const PagedCall& call;
  int64_t sequence, kv_head, group, first, count, before;

  PagedPassage(const PagedCall& call, int64_t sequence, int64_t head)
      : call(call), sequence(sequence), kv_head(head), group(call.args.heads / call.pool.kv_heads) {
    first = call.sequences.rows[sequence];
    count = call.sequences.rows[sequence + 1] - first;
    before = call.sequences.lengths[sequence] - count;
  }
  int64_t rows() const { return count * group; }
  int64_t width() const { return call.block.width; }
  int64_t head(int64_t row) const { return kv_head * group + row % group; }
  int64_t at(int64_t row, int64_t stride) const {
    return (first + row / group) * stride + head(row) * call.block.dim;
  }
  Row row(int64_t i) const {
    const int64_t position = before + i / group, window = call.args.window;
    const float slope = call.args.slopes ? call.args.slopes[head(i)] : 0;
    return {window && position >= window ? position - window + 1 : 0, position + 1, position, slope,
            nullptr, 0};
  }
  ScoreRules rules() const {
    return {call.args.softcap, call.args.slopes != nullptr, 0, MEMLM_F32, 0, 0, 1};
  }
  float sink(int64_t row) const { return call.args.sinks ? call.args.sinks[head(row)] : -INFINITY; }
  void store(int64_t row, float, float* values) const {
    if (kv_is_quantized(call.block.type)) hadamard(values, call.block.channels);
    store_floats(call.args.out, call.args.dtype, at(row, call.args.out_stride), call.block.dim, values);
  }
  // The block that token t is in.
  const char* block_of(int64_t t) const {
    const memlm_sequences& s = call.sequences;
    const int64_t block = s.tables[sequence * s.table_stride + t / call.block.tokens];
    return static_cast<const char*>(call.pool.blocks) +
           (kv_head * call.pool.count + block) * call.block.bytes();
  }
  // Its tail, if token t is in it, or NULL.
  const char* tail_of(int64_t t) const {
    const memlm_sequences& s = call.sequences;
    if (!call.pool.tails || t / call.block.tokens != (s.lengths[sequence] - 1) / call.block.tokens)
      return nullptr;
    return static_cast<const char*>(call.pool.tails) +
           (kv_head * call.pool.tail_count + s.tails[sequence]) * kv_tail(call.block).bytes();
  }
  // A query, times scale; zeros up to `padded`, a multiple of 16.
  void query(int64_t row, int64_t padded, float* to) const {
    const F scale = f_set1(call.args.scale);
    const int64_t from = at(row, call.args.q_stride), dim = call.block.dim;
    int64_t d = 0;
    for (; d < dim; d += 16)
      f_store(to + d, f_mul(load_floats(call.args.q, call.args.dtype, from + d, dim - d < 16 ? dim - d : 16), scale));
    for (; d < padded; d += 16) f_store(to + d, f_zero());
  }
};

// The products with a block of T, f32 or bf16.
template <class T>
class FloatBlock {
  const KvBlock block;
  float* packed;  // queries, register tile by register tile, [channels][rows of the tile]
  int64_t tile_rows = 0;
  const T *k_tiles = nullptr, *v_tiles = nullptr;

 public:
  static int64_t bytes(const KvBlock& b) { return 4 * kBlockRows * round_up16(b.channels); }
  FloatBlock(const KvBlock& b, char* room) : block(b), packed(reinterpret_cast<float*>(room)) {}

  // The query x [channels] as row m of the mt rows of a tile.
  void query(int64_t tile, int64_t rows, int m, int mt, const float* x) {
    tile_rows = rows;
    float* const to = packed + tile * tile_rows * block.channels + m;
    for (int64_t c = 0; c < block.channels; ++c) to[c * mt] = x[c];
  }
  void set(const char* at) {
    k_tiles = reinterpret_cast<const T*>(at);
    v_tiles = reinterpret_cast<const T*>(at + block.values());
  }
  template <int MT>
  void scores(int64_t tile, int64_t first, int64_t blocks, float* s) const {
    const int64_t n = block.channels;
    multiply<MT>(packed + tile * tile_rows * n, 1, MT, Tiles<T>{k_tiles + first * n * 16, n * 16}, blocks,
                 n, nullptr, s, kMostKeys);
  }
  template <int MT>
  void values(int64_t first, int64_t keys, const float* weights, const float* factors, float* out,
              int64_t width) const {
    multiply<MT>(weights, kMostKeys, 1, Tiles<T>{v_tiles + first * 16, block.tokens * 16}, width / 16,
                 keys, factors, out, width);
  }
};

// Keys and values as T.
template <class T>
class PlainKeys {
  const PagedPassage& p;
  FloatBlock<T> floats;

 public:
  static int64_t bytes(const PagedPassage& p) { return FloatBlock<T>::bytes(p.call.block); }
  PlainKeys(const PagedPassage& p, char* room) : p(p), floats(p.call.block, room) {}

  int64_t keys() const { return p.call.block.tokens; }
  void queries(int64_t first, const RowTiles& tiles) {
    alignas(64) float x[kMostHeadDim];
    for (int64_t t = 0; t < tiles.count; ++t)
      for (int m = 0; m < tiles.rows_of(t); ++m) {
        p.query(first + t * tiles.rows + m, 0, x);
        floats.query(t, tiles.rows, m, tiles.rows_of(t), x);
      }
  }
  void block(int64_t j) { floats.set(p.block_of(j)); }
  template <int MT>
  void scores(int64_t tile, int64_t first, int64_t blocks, float* s) const {
    floats.template scores<MT>(tile, first, blocks, s);
  }
  template <int MT>
  void values(int64_t first, int64_t keys, const float* weights, const float* factors, float* out,
              int64_t width) const {
    floats.template values<MT>(first, keys, weights, factors, out, width);
  }
};

// Integer sums of codes that are numbers from 0 up.
template <int kZeroPoint>
struct UnsignedCodes {
  static constexpr int kZero = kZeroPoint, kDotBias = kZeroPoint;
  static constexpr bool kOffsets = false, kUnit = false;
  static I dot(I acc, B w, const int8_t* x) { return i_dot_u7(acc, w, x); }
};

struct Code4 : Nibbles, UnsignedCodes<8> {};

struct Code5 : UnsignedCodes<16> {
  static constexpr int kBits = 5;
  static void load2(const uint8_t* p, int i, B& b0, B& b1) {
    Nibbles::load2(p, i, b0, b1);
    const uint8_t* const fifth = p + tile_bytes(4, kActGroup) + 16 * i;
    b0 = b_add_where(b0, fifth, 16);
    b1 = b_add_where(b1, fifth + 8, 16);
  }
};

// Keys and values as codes of types K and V.
template <class K, class V>
class CodedKeys {
  const PagedPassage& p;
  const KvBlock& b;
  char* queries_;   // register tiles of PerRow<K>, for each the groups of channels one after the other
  char* weights_;   // one register tile of PerRow<V>
  float* v_scales;  // [groups][kMostKeys]
  int64_t tile_rows;
  const char* at;
  FloatBlock<uint16_t> tail;
  bool in_tail;

  // Row x [k] to a lane of a register tile.
  template <class W>
  static void pack(const float* x, int64_t k, int lane, int lanes, char* to) {
    I largest = i_zero(), sum = i_zero();
    for (int64_t i = 0; i < k; i += 16) largest = i_max(largest, f_magnitude_bits(f_load(x + i)));
    const Rounding rounding(i_reduce_max(largest));
    for (int64_t i = 0; i < k; i += 16) {
      int8_t codes[16];
      const I rounded = rounding.codes(f_load(x + i));
      i_store_i8(codes, rounded);
      sum = i_add(sum, rounded);
      for (int j = 0; j < 16; j += kLaneK) memcpy(to + (i + j) * lanes + lane * kLaneK, codes + j, kLaneK);
    }
    const RowEnds ends = PerRow<W>::ends(to, k, lanes);
    ends.scale(lane) = rounding.scale;
    ends.start(lane) = -W::kDotBias * i_reduce_add(sum);
  }
  // The product of a register tile x [MT][k] with a tile of codes; use(m, sums of row m times its scale).
  template <class W, int MT, class Use>
  static void multiply_codes(const char* codes, int64_t k, const char* x, const Use& use) {
    const W codec{};
    const Stretch<W> s(codec, codes, Scales{}, 1, k / kActGroup);
    alignas(64) float sums[MT * 16];
    PerRow<W>::start(x, k, MT, sums);
    PerRow<W>::template direct<MT>(s, x, sums);
    const RowEnds ends = PerRow<W>::ends(x, k, MT);
    for (int m = 0; m < MT; ++m)
      use(m, f_mul(f_from_i(i_load(sums + m * 16)), f_set1(ends.scale(m))));
  }
  int64_t query_bytes() const { return PerRow<K>::row_bytes(b.group) * b.groups(); }

 public:
  static int64_t bytes(const PagedPassage& p) {
    const KvBlock& b = p.call.block;
    return kBlockRows * PerRow<K>::row_bytes(b.group) * b.groups() +
           kTileM * PerRow<V>::row_bytes(kMostKeys) + 4 * kMostKeys * b.groups() +
           (p.call.pool.tails ? FloatBlock<uint16_t>::bytes(kv_tail(b)) : 0);
  }
  CodedKeys(const PagedPassage& p, char* room)
      : p(p),
        b(p.call.block),
        queries_(room),
        weights_(queries_ + kBlockRows * query_bytes()),
        v_scales(reinterpret_cast<float*>(weights_ + kTileM * PerRow<V>::row_bytes(kMostKeys))),
        tail(kv_tail(b), reinterpret_cast<char*>(v_scales + kMostKeys * b.groups())) {
  }

  int64_t keys() const { return b.tokens; }
  void queries(int64_t first, const RowTiles& tiles) {
    alignas(64) float x[kMostHeadDim];
    tile_rows = tiles.rows;
    for (int64_t t = 0; t < tiles.count; ++t) {
      const int mt = tiles.rows_of(t);
      for (int m = 0; m < mt; ++m) {
        p.query(first + t * tile_rows + m, b.channels, x);
        hadamard(x, b.channels);
        if (p.call.pool.tails) tail.query(t, tile_rows, m, mt, x);
        for (int64_t g = 0; g < b.groups(); ++g)
          pack<K>(x + g * b.group, b.group, m, mt,
                  queries_ + t * tile_rows * query_bytes() + g * mt * PerRow<K>::row_bytes(b.group));
      }
    }
  }
  void block(int64_t j) {
    const char* const unrounded = p.tail_of(j);
    in_tail = unrounded != nullptr;
    if (in_tail) return tail.set(unrounded);
    at = p.block_of(j);
    for (int64_t g = 0; g < b.groups(); ++g)
      for (int64_t t = 0; t < b.tokens; t += 16)
        f_store(v_scales + g * kMostKeys + t,
                f_load_f16(reinterpret_cast<const uint16_t*>(at + b.value_scales()) + g * b.tokens + t));
  }
  template <int MT>
  void scores(int64_t tile, int64_t first, int64_t blocks, float* s) const {
    if (in_tail) return tail.template scores<MT>(tile, first, blocks, s);
    const uint16_t* const scales = reinterpret_cast<const uint16_t*>(at + b.key_scales());
    for (int64_t i = 0; i < blocks; ++i)
      for (int64_t g = 0; g < b.groups(); ++g) {
        const F scale = f_load_f16(scales + ((first + i) * b.groups() + g) * 16);
        const char* const x =
            queries_ + tile * tile_rows * query_bytes() + g * MT * PerRow<K>::row_bytes(b.group);
        multiply_codes<K, MT>(
            at + (first + i) * b.key_tile() + tile_bytes(K::kBits, g * b.group), b.group, x,
            [&](int m, F sum) {
              float* const to = s + m * kMostKeys + i * 16;
              f_store(to, g ? f_fma(sum, scale, f_load(to)) : f_mul(sum, scale));
            });
      }
  }
  template <int MT>
  void values(int64_t first, int64_t keys, const float* weights, const float* factors, float* out,
              int64_t width) const {
    if (in_tail) return tail.template values<MT>(first, keys, weights, factors, out, width);
    // Whole runs of 32 tokens: `first` is a multiple of 16, and weights reach to one.
    const int64_t from = first / kActGroup * kActGroup, skipped = first - from;
    const int64_t count = div_up(first + keys - from, kActGroup) * kActGroup;
    for (int64_t g = 0; g < b.groups(); ++g) {
      const float* const scales = v_scales + g * kMostKeys + from;
      for (int m = 0; m < MT; ++m) {
        alignas(64) float scaled[kMostKeys];
        for (int64_t t = 0; t < count; t += 16) {
          const bool seen = t >= skipped && t < skipped + keys;
          // By comparison: the scale of a token that is not there may be NaN.
          const F w = seen ? f_load(weights + m * kMostKeys + t - skipped) : f_zero();
          f_store(scaled + t, f_if_less(f_zero(), w, f_mul(w, f_load(scales + t)), w));
        }
        pack<V>(scaled, count, m, MT, weights_);
      }
      for (int64_t c = g * b.group; c < (g + 1) * b.group; c += 16)
        multiply_codes<V, MT>(
            at + b.values() + c / 16 * b.value_tile() + tile_bytes(V::kBits, from), count, weights_,
            [&](int m, F sum) {
              float* const to = out + m * width + c;
              f_store(to, f_fma(f_load(to), f_set1(factors[m]), sum));
            });
    }
  }
};

inline memlm_status paged_attention(const memlm_kv_pool& pool, const memlm_sequences& s,
                                    const memlm_paged_attention_args& args) {
  const PagedCall call = {pool, s, args, KvBlock(pool.type, pool.block_tokens, pool.head_dim)};
  const auto make = [&](int64_t sequence, int64_t head) { return PagedPassage(call, sequence, head); };
  switch (pool.type) {
    case MEMLM_KV_F32: return run_passages<PlainKeys<float>>(s.count, pool.kv_heads, args.threads, make);
    case MEMLM_KV_BF16: return run_passages<PlainKeys<uint16_t>>(s.count, pool.kv_heads, args.threads, make);
    case MEMLM_KV_INT8: return run_passages<CodedKeys<W8, W8>>(s.count, pool.kv_heads, args.threads, make);
    default: return run_passages<CodedKeys<Code5, Code4>>(s.count, pool.kv_heads, args.threads, make);
  }
}

}  // namespace MEMLM_ISA
}  // namespace memlm
