// paged_attention: over keys and values in blocks, read as they are stored (csrc/kv_blocks.h).
//
// Quantised blocks are read by the products of fast mode (fast-inl.h): queries are rounded to int8, with
// a scale for each row and 32 channels; so are softmax weights times the scales of the values, with one
// for each row and 32 tokens.
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

// Keys and values as T: f32, or bf16.
template <class T>
class PlainKeys {
  const PagedPassage& p;
  float* packed;  // register tile by register tile, [dim][rows of the tile]
  int64_t tile_rows;
  const T *k_tiles, *v_tiles;

 public:
  static int64_t bytes(const PagedPassage& p) { return 4 * kBlockRows * round_up16(p.call.block.dim); }
  PlainKeys(const PagedPassage& p, char* room) : p(p), packed(reinterpret_cast<float*>(room)) {}

  int64_t keys() const { return p.call.block.tokens; }
  void queries(int64_t first, const RowTiles& tiles) {
    const int64_t dim = p.call.block.dim;
    alignas(64) float x[kMostHeadDim];
    tile_rows = tiles.rows;
    for (int64_t t = 0; t < tiles.count; ++t) {
      const int mt = tiles.rows_of(t);
      for (int m = 0; m < mt; ++m) {
        p.query(first + t * tile_rows + m, 0, x);
        for (int64_t d = 0; d < dim; ++d) packed[t * tile_rows * dim + d * mt + m] = x[d];
      }
    }
  }
  void block(int64_t j) {
    const char* const at = p.block_of(j);
    k_tiles = reinterpret_cast<const T*>(at);
    v_tiles = reinterpret_cast<const T*>(at + p.call.block.values());
  }
  template <int MT>
  void scores(int64_t tile, int64_t first, int64_t blocks, float* s) const {
    const int64_t dim = p.call.block.dim;
    multiply<MT>(packed + tile * tile_rows * dim, 1, MT, Tiles<T>{k_tiles + first * dim * 16, dim * 16},
                 blocks, dim, nullptr, s, kMostKeys);
  }
  template <int MT>
  void values(int64_t first, int64_t keys, const float* weights, const float* factors, float* out,
              int64_t width) const {
    multiply<MT>(weights, kMostKeys, 1, Tiles<T>{v_tiles + first * 16, p.call.block.tokens * 16},
                 width / 16, keys, factors, out, width);
  }
};

// Scales of codes that are multiplied with nothing.
struct Ones {
  float v[kMostKeys / kActGroup * 16];
  constexpr Ones() : v() {
    for (float& x : v) x = 1;
  }
};

// Codes of weight type W.
template <class W>
class CodedKeys {
  using Mode = Fast<W>;
  const PagedPassage& p;
  const KvBlock& b;
  char* queries_;  // records of Mode, register tile by register tile
  char* weights_;  // likewise, of one register tile and block
  float* scaled;   // [kTileM][kMostKeys]
  float* v_scales; // [groups][kMostKeys]
  int64_t tile_rows;
  const char* at;

  // Rows x [rows][k], `stride` apart, as the register tile that Mode multiplies with.
  static void pack(const float* x, int64_t stride, int rows, int64_t k, int lane, int lanes, char* to) {
    memlm_matmul_args args = {};
    args.x = x;
    args.x_stride = stride;
    args.dtype = MEMLM_F32;
    const Input in = {args, nullptr, kActGroup};
    for (int i = 0; i < rows; ++i) Mode::pack(in, i, k, k, lanes, lane + i, nullptr, to);
  }
  // sums [MT][16] += the register tile at x times `groups` groups of k of a tile of codes.
  template <int MT>
  static void multiply_codes(const char* codes, Scales scales, int64_t group, int64_t groups,
                             const char* x, float* sums) {
    const W codec{};
    Stretch<W> s(codec, codes, scales, groups, group / kActGroup);
    Mode::template direct<MT>(s, x, sums);
  }

 public:
  static int64_t bytes(const PagedPassage& p) {
    const KvBlock& b = p.call.block;
    return kBlockRows * Mode::row_bytes(b.channels) + kTileM * Mode::row_bytes(kMostKeys) +
           4 * kMostKeys * (kTileM + b.groups());
  }
  CodedKeys(const PagedPassage& p, char* room) : p(p), b(p.call.block), queries_(room) {
    weights_ = queries_ + kBlockRows * Mode::row_bytes(b.channels);
    scaled = reinterpret_cast<float*>(weights_ + kTileM * Mode::row_bytes(kMostKeys));
    v_scales = scaled + kTileM * kMostKeys;
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
        pack(x, b.channels, 1, b.channels, m, mt,
             queries_ + t * tile_rows * Mode::row_bytes(b.channels));
      }
    }
  }
  void block(int64_t j) {
    at = p.block_of(j);
    for (int64_t g = 0; g < b.groups(); ++g)
      for (int64_t t = 0; t < b.tokens; t += 16)
        f_store(v_scales + g * kMostKeys + t,
                f_load_f16(reinterpret_cast<const uint16_t*>(at + b.value_scales()) + g * b.tokens + t));
  }
  template <int MT>
  void scores(int64_t tile, int64_t first, int64_t blocks, float* s) const {
    const char* const x = queries_ + tile * tile_rows * Mode::row_bytes(b.channels);
    const uint16_t* const scales = reinterpret_cast<const uint16_t*>(at + b.key_scales());
    for (int64_t i = 0; i < blocks; ++i) {
      alignas(64) float sums[MT * 16] = {};
      multiply_codes<MT>(at + (first + i) * b.key_tile(),
                         {scales + (first + i) * b.groups() * 16, true}, b.group, b.groups(), x, sums);
      for (int m = 0; m < MT; ++m) f_store(s + m * kMostKeys + i * 16, f_load(sums + m * 16));
    }
  }
  template <int MT>
  void values(int64_t first, int64_t keys, const float* weights, const float* factors, float* out,
              int64_t width) const {
    alignas(64) static constexpr Ones ones;
    // Whole groups of 32 tokens: `first` is a multiple of 16, and weights reach to one.
    const int64_t from = first / kActGroup * kActGroup, skipped = first - from;
    const int64_t count = div_up(first + keys - from, kActGroup) * kActGroup;
    for (int64_t g = 0; g < b.groups(); ++g) {
      const float* const scales = v_scales + g * kMostKeys + from;
      for (int m = 0; m < MT; ++m) {
        float* const row = scaled + m * kMostKeys;
        for (int64_t t = 0; t < count; t += 16) {
          const bool seen = t >= skipped && t < skipped + keys;
          // By comparison: a scale that nothing has been stored for may be NaN.
          const F w = seen ? f_load(weights + m * kMostKeys + t - skipped) : f_zero();
          f_store(row + t, f_if_less(f_zero(), w, f_mul(w, f_load(scales + t)), w));
        }
      }
      pack(scaled, kMostKeys, MT, count, 0, MT, weights_);
      for (int64_t c = g * b.group; c < (g + 1) * b.group; c += 16) {
        alignas(64) float sums[MT * 16];
        for (int m = 0; m < MT; ++m)
          f_store(sums + m * 16, f_mul(f_load(out + m * width + c), f_set1(factors[m])));
        multiply_codes<MT>(at + b.values() + c / 16 * b.value_tile() + tile_bytes(W::kBits, from),
                           {ones.v, false}, kActGroup, count / kActGroup, weights_, sums);
        for (int m = 0; m < MT; ++m) f_store(out + m * width + c, f_load(sums + m * 16));
      }
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
    case MEMLM_KV_INT8: return run_passages<CodedKeys<W8>>(s.count, pool.kv_heads, args.threads, make);
    default: return run_passages<CodedKeys<W4<false>>>(s.count, pool.kv_heads, args.threads, make);
  }
}

}  // namespace MEMLM_ISA
}  // namespace memlm
