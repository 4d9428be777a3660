// paged_attention: over keys and values in blocks, read as they are stored (csrc/kv_blocks.h).
//
// Quantised blocks are read by integer products: queries are rounded to int8, with one
// scale for each row and group of channels; so are softmax weights times the scales of the values, with
// one for each row and block.
#pragma once
#include "attend-inl.h"
#include "attention-inl.h"
#include "hadamard-inl.h"
#include "kv_append-inl.h"
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
  int64_t block_rows() const { return kBlockRows; }
  template <class Use>
  void runs(int64_t, int64_t lo, int64_t hi, const Use& use) const { use(lo, hi); }
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
      f_store(to + d,
              f_mul(load_floats(call.args.q, call.args.dtype, from + d, dim - d < 16 ? dim - d : 16), scale));
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
  int64_t start(int64_t j) const { return j / keys() * keys(); }
  void queries(int64_t first, const RowTiles& tiles) {
    alignas(64) float x[kMostHeadDim];
    for (int64_t t = 0; t < tiles.count; ++t)
      for (int m = 0; m < tiles.rows_of(t); ++m) {
        p.query(first + t * tiles.rows + m, 0, x);
        floats.query(t, tiles.rows, m, tiles.rows_of(t), x);
      }
  }
  void block(int64_t j, int64_t) { floats.set(p.block_of(j)); }
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

// Codes that are numbers from 0 up.
template <int kZeroPoint>
struct UnsignedCodes {
  static constexpr int kDotBias = kZeroPoint;
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

// Rows rounded to int8, kStride apart, each with a scale and, of all products, where the sums of codes of
// type W start.
template <class W>
struct RoundedRows {
  static constexpr int64_t kStride = kMostHeadDim;
  static_assert(kMostKeys <= kStride, "rows are queries or weights");
  static constexpr int64_t bytes(int64_t rows) { return rows * (kStride + 4 + 4); }

  int8_t* codes;
  float* scales;
  int32_t* starts;

  RoundedRows(char* room, int64_t rows)
      : codes(reinterpret_cast<int8_t*>(room)),
        scales(reinterpret_cast<float*>(room + rows * kStride)),
        starts(reinterpret_cast<int32_t*>(scales + rows)) {}
  RoundedRows from(int64_t row) const { return {codes + row * kStride, scales + row, starts + row}; }

  // Row `row` becomes x(0), x(16), .., x(k - 16).
  template <class X>
  void set(int64_t row, int64_t k, const X& x) const {
    I largest = i_zero(), sum = i_zero();
    for (int64_t i = 0; i < k; i += 16) largest = i_max(largest, f_magnitude_bits(x(i)));
    const Rounding rounding(i_reduce_max(largest));
    for (int64_t i = 0; i < k; i += 16) {
      const I rounded = rounding.codes(x(i));
      i_store_i8(codes + row * kStride + i, rounded);
      sum = i_add(sum, rounded);
    }
    scales[row] = rounding.scale;
    starts[row] = -W::kDotBias * i_reduce_add(sum);
  }
  // use(m, products of row m with a tile of codes [k]), for the first MT rows.  `ahead` bytes further on
  // are the codes that are wanted when this block is done.
  template <int MT, class Use>
  void multiply(const char* tile, int64_t k, int64_t ahead, const Use& use) const {
    constexpr int kChains = chains(MT);
    I sums[MT][kChains];
    for (int m = 0; m < MT; ++m)
      for (int c = 0; c < kChains; ++c) sums[m][c] = c ? i_zero() : i_set1(starts[m]);
    const W codec{};
    const uint8_t* at = reinterpret_cast<const uint8_t*>(tile);
    const int8_t* x = codes;
#pragma GCC unroll 1
    for (int64_t i = 0; i < k; i += kActGroup, at += tile_bytes(W::kBits, kActGroup)) {
      for (int64_t line = 0; line < tile_bytes(W::kBits, kActGroup); line += kBlock) {
        __builtin_prefetch(at + line + ahead, 0, 2);
        __builtin_prefetch(at + line + kPrefetchL1, 0, 3);
      }
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j, x += 2 * kLaneK) {
        B b0, b1;
        codec.load2(at, j, b0, b1);
        for (int m = 0; m < MT; ++m) {
          I& even = sums[m][2 * j % kChains];
          even = W::dot(even, b0, x + m * kStride);
        }
        for (int m = 0; m < MT; ++m) {
          I& odd = sums[m][(2 * j + 1) % kChains];
          odd = W::dot(odd, b1, x + m * kStride + kLaneK);
        }
      }
    }
    for (int m = 0; m < MT; ++m) {
      I total = sums[m][0];
      for (int c = 1; c < kChains; ++c) total = i_add(total, sums[m][c]);
      use(m, f_mul(f_from_i(total), f_set1(scales[m])));
    }
  }

 private:
  RoundedRows(int8_t* codes, float* scales, int32_t* starts)
      : codes(codes), scales(scales), starts(starts) {}
};

// Keys and values as codes of types K and V.
template <class K, class V>
class CodedKeys {
  const PagedPassage& p;
  const KvBlock& b;
  char* const room;
  const RoundedRows<V> weights_;
  float* const v_scales;  // [groups][kMostKeys]
  FloatBlock<uint16_t> tail;
  int64_t tile_rows = 0;
  const char* at = nullptr;
  int64_t ahead = 0;  // from this block to the next
  bool in_tail = false;

  // Queries' channels of group g.
  RoundedRows<K> queries_of(int64_t g) const {
    return {room + g * RoundedRows<K>::bytes(kBlockRows), kBlockRows};
  }
  static int64_t queries_bytes(const KvBlock& b) { return RoundedRows<K>::bytes(kBlockRows) * b.groups(); }
  static int64_t scales_bytes(const KvBlock& b) { return 4 * kMostKeys * b.groups(); }

 public:
  static int64_t bytes(const PagedPassage& p) {
    const KvBlock& b = p.call.block;
    return queries_bytes(b) + scales_bytes(b) + FloatBlock<uint16_t>::bytes(kv_tail(b)) +
           (RoundedRows<V>::bytes(kTileM) + 63) / 64 * 64;
  }
  CodedKeys(const PagedPassage& p, char* room)
      : p(p),
        b(p.call.block),
        room(room),
        weights_(room + queries_bytes(b) + scales_bytes(b) + FloatBlock<uint16_t>::bytes(kv_tail(b)), kTileM),
        v_scales(reinterpret_cast<float*>(room + queries_bytes(b))),
        tail(kv_tail(b), room + queries_bytes(b) + scales_bytes(b)) {}

  int64_t keys() const { return b.tokens; }
  int64_t start(int64_t j) const { return j / b.tokens * b.tokens; }
  void queries(int64_t first, const RowTiles& tiles) {
    alignas(64) float x[kMostHeadDim];
    tile_rows = tiles.rows;
    for (int64_t t = 0; t < tiles.count; ++t) {
      const int mt = tiles.rows_of(t);
      for (int m = 0; m < mt; ++m) {
        const int64_t row = t * tile_rows + m;
        p.query(first + row, b.channels, x);
        hadamard(x, b.channels);
        if (p.call.pool.tails) tail.query(t, tile_rows, m, mt, x);
        for (int64_t g = 0; g < b.groups(); ++g)
          queries_of(g).set(row, b.group, [&](int64_t i) { return f_load(x + g * b.group + i); });
      }
    }
  }
  void block(int64_t j, int64_t) {
    const char* const unrounded = p.tail_of(j);
    in_tail = unrounded != nullptr;
    if (in_tail) return tail.set(unrounded);
    at = p.block_of(j);
    // A whole block ahead: between the products nothing else asks memory for more.
    ahead = j + b.tokens < p.before + p.count ? p.block_of(j + b.tokens) - at : 0;
    for (int64_t i = b.key_scales(); i < b.bytes(); i += kBlock)
      __builtin_prefetch(at + i + ahead, 0, 3);
    const uint16_t* const scales = reinterpret_cast<const uint16_t*>(at + b.value_scales());
    // Zeros for tokens that are not there: theirs may be NaN.
    const F end = f_set1(static_cast<float>(p.before + p.count - j));
    for (int64_t t = 0; t < b.tokens; t += 16) {
      const F token = f_add(lanes(), f_set1(static_cast<float>(t)));
      for (int64_t g = 0; g < b.groups(); ++g)
        f_store(v_scales + g * kMostKeys + t,
                f_if_less(token, end, f_load_f16(scales + g * b.tokens + t), f_zero()));
    }
  }
  template <int MT>
  void scores(int64_t tile, int64_t first, int64_t blocks, float* s) const {
    if (in_tail) return tail.template scores<MT>(tile, first, blocks, s);
    const uint16_t* const scales = reinterpret_cast<const uint16_t*>(at + b.key_scales());
    for (int64_t g = 0; g < b.groups(); ++g) {
      const RoundedRows<K> x = queries_of(g).from(tile * tile_rows);
      for (int64_t i = 0; i < blocks; ++i) {
        const F scale = f_load_f16(scales + ((first + i) * b.groups() + g) * 16);
        const char* const codes = at + (first + i) * b.key_tile() + tile_bytes(K::kBits, g * b.group);
        x.template multiply<MT>(codes, b.group, ahead, [&](int m, F sum) {
          float* const to = s + m * kMostKeys + i * 16;
          f_store(to, g ? f_fma(sum, scale, f_load(to)) : f_mul(sum, scale));
        });
      }
    }
  }
  template <int MT>
  void values(int64_t first, int64_t keys, const float* weights, const float* factors, float* out,
              int64_t width) const {
    if (in_tail) return tail.template values<MT>(first, keys, weights, factors, out, width);
    // Whole runs of 32 tokens: `first` is a multiple of 16, and so many weights are there.
    const int64_t from = first / kActGroup * kActGroup, skipped = first - from;
    const int64_t end = skipped + div_up(keys, 16) * 16, count = div_up(end, kActGroup) * kActGroup;
    for (int64_t g = 0; g < b.groups(); ++g) {
      for (int m = 0; m < MT; ++m)
        weights_.set(m, count, [&](int64_t t) {
          if (t < skipped || t >= end) return f_zero();
          return f_mul(f_load(weights + m * kMostKeys + t - skipped),
                       f_load(v_scales + g * kMostKeys + from + t));
        });
      for (int64_t c = g * b.group; c < (g + 1) * b.group; c += 16)
        weights_.template multiply<MT>(
            at + b.values() + c / 16 * b.value_tile() + tile_bytes(V::kBits, from), count, ahead,
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
