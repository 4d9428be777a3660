// attention: over keys and values that lie in plain tensors.
#pragma once
#include "attend-inl.h"

namespace memlm {
namespace MEMLM_ISA {

constexpr int kDenseKeys = 128;  // keys per block: with heads of 128, 64 KB of an L2

inline int64_t element_size(memlm_dtype dtype) { return dtype == MEMLM_F32 ? 4 : 2; }

inline const char* element(const void* base, memlm_dtype dtype, int64_t i) {
  return static_cast<const char*>(base) + i * element_size(dtype);
}

// `rows` rows of `columns` numbers, `stride` elements apart, turned: tile t of 16 rows to [columns][16].
// Zeros in place of missing rows.
inline void pack_turned(const char* from, memlm_dtype dtype, int64_t stride, int64_t rows,
                        int64_t columns, float* to) {
  for (int64_t r = 0; r < rows; r += 16, to += columns * 16)
    for (int64_t c = 0; c < columns; c += 16) {
      const int64_t count = columns - c < 16 ? columns - c : 16;
      F x[16];
      for (int i = 0; i < 16; ++i)
        x[i] = r + i < rows ? load_floats(from, dtype, (r + i) * stride + c, count) : f_zero();
      f_transpose(x);
      for (int i = 0; i < count; ++i) f_store(to + (c + i) * 16, x[i]);
    }
}

// The same rows by columns: tile t of 16 columns to [size][16], size >= rows.  Zeros in place of
// missing columns.
inline void pack_straight(const char* from, memlm_dtype dtype, int64_t stride, int64_t rows,
                          int64_t columns, int64_t size, float* to) {
  for (int64_t c = 0; c < columns; c += 16, to += size * 16) {
    const int64_t count = columns - c < 16 ? columns - c : 16;
    for (int64_t r = 0; r < rows; ++r) f_store(to + r * 16, load_floats(from, dtype, r * stride + c, count));
  }
}

// One sequence of one key-value head.  With a block mask, of one of its query heads: what is hidden from
// a block of rows is then one row of the mask.
struct DensePassage {
  const memlm_attention_args& a;
  int64_t batch, kv_head, first_head, group;
  int64_t q_len, k_len, q_first, k_first;  // the sequence's part of the tensors

  // So many passages read one key-value head.
  static int64_t members(const memlm_attention_args& a) { return a.block_mask ? a.heads / a.kv_heads : 1; }

  DensePassage(const memlm_attention_args& args, int64_t sequence, int64_t head, int64_t member)
      : a(args), batch(args.q_offsets ? 0 : sequence), kv_head(head),
        group(args.heads / args.kv_heads / members(args)) {
    first_head = (kv_head * members(a) + member) * group;
    q_first = a.q_offsets ? a.q_offsets[sequence] : 0;
    k_first = a.q_offsets ? a.k_offsets[sequence] : 0;
    q_len = a.q_offsets ? a.q_offsets[sequence + 1] - q_first : a.q_len;
    k_len = a.q_offsets ? a.k_offsets[sequence + 1] - k_first : a.k_len;
    sequence_ = sequence;
  }
  int64_t rows() const { return q_len * group; }
  // Blocks of the block mask, and rows that pass together, end together.
  int64_t block_rows() const {
    static_assert(2 * kTileM <= 32, "a cut passage lies in the smallest block of a mask");
    if (!a.block_mask) return kBlockRows;
    int64_t parts = div_up(a.mask_block, kBlockRows);
    while (a.mask_block % parts) ++parts;
    return a.mask_block / parts;
  }
  template <class Use>
  void runs(int64_t r0, int64_t lo, int64_t hi, const Use& use) const {
    const int64_t size = a.mask_block, step = a.block_mask_strides[3];
    const uint8_t* const shown =
        a.block_mask ? a.block_mask + offset(a.block_mask_strides, first_head, r0 / size) : nullptr;
    for (int64_t begin = lo, end = hi; begin < hi; begin = end, end = hi) {
      if (shown) {
        int64_t i = begin / size;
        const bool hidden = !shown[i * step];
        do ++i;
        while (i * size < hi && !shown[i * step] == hidden);
        if (i * size < hi) end = i * size;
        if (hidden) continue;
      }
      use(begin, end);
    }
  }
  int64_t width() const { return round_up16(a.v_dim); }
  float sink(int64_t row) const { return a.sinks ? a.sinks[head(row)] : -INFINITY; }
  void store(int64_t row, float lse, const float* values) const {
    a.lse[lse_at(row)] = lse;
    store_floats(a.out, a.dtype, q_at(a.out_strides, row), a.v_dim, values);
  }
  int64_t head(int64_t row) const { return first_head + row % group; }
  int64_t query(int64_t row) const { return row / group; }
  int64_t offset(const int64_t* strides, int64_t head, int64_t i) const {
    return batch * strides[0] + head * strides[1] + i * strides[2];
  }
  // Where a query's row, or a key's, begins in a tensor with these strides.
  int64_t q_at(const int64_t* strides, int64_t row) const {
    return offset(strides, head(row), q_first + query(row));
  }
  int64_t k_at(const int64_t* strides, int64_t key) const {
    return offset(strides, kv_head, k_first + key);
  }
  int64_t lse_at(int64_t row) const {
    return (batch * a.heads + head(row)) * a.q_len + q_first + query(row);
  }
  Row row(int64_t i) const {
    Row r;
    const int64_t q = query(i), h = head(i), right = a.right;
    r.position = q + (a.to_end ? k_len - q_len : 0);
    r.lo = a.left < 0 || r.position < a.left ? 0 : r.position - a.left;
    r.hi = right < 0 || right > k_len || r.position + right + 1 > k_len ? k_len : r.position + right + 1;
    if (r.hi < 0) r.hi = 0;
    if (r.lo > r.hi) r.lo = r.hi;
    r.slope = a.slopes ? a.slopes[h] : 0;
    r.mask = nullptr;
    if (a.mask) {
      const int64_t at = offset(a.mask_strides, h, q);
      r.mask = a.mask_is_bool ? static_cast<const char*>(a.mask) + at : element(a.mask, a.dtype, at);
    }
    r.dropout = a.dropout > 0 ? dropout_row(a.seed, sequence_, h, q) : 0;
    return r;
  }
  ScoreRules rules() const {
    return {a.softcap,          a.mask || a.slopes, a.mask_is_bool, a.dtype, a.mask_strides[3],
            dropout_threshold(a.dropout), 1 / (1 - a.dropout)};
  }

 private:
  int64_t sequence_;
};

// Rows r0 .. of the passage, register tile by register tile: [head_dim][rows of the tile], times scale.
inline void pack_queries(const DensePassage& p, int64_t r0, const RowTiles& tiles, float* to) {
  const int64_t dim = p.a.head_dim;
  const F scale = f_set1(p.a.scale);
  for (int64_t t = 0; t < tiles.count; ++t, to += tiles.rows * dim) {
    const int mt = tiles.rows_of(t);
    for (int m = 0; m < mt; ++m) {
      const int64_t at = p.q_at(p.a.q_strides, r0 + t * tiles.rows + m);
      for (int64_t d = 0; d < dim; d += 16) {
        const int64_t count = dim - d < 16 ? dim - d : 16;
        alignas(64) float x[16];
        f_store(x, f_mul(load_floats(p.a.q, p.a.dtype, at + d, count), scale));
        for (int i = 0; i < count; ++i) to[(d + i) * mt + m] = x[i];
      }
    }
  }
}

class DenseKeys {
  const DensePassage& p;
  float *k_tiles, *v_tiles, *packed;
  int64_t tile_rows;

 public:
  static int64_t bytes(const DensePassage& p) {
    const int64_t dim = p.a.head_dim;
    return 4 * (kDenseKeys * (dim + p.width()) + round_up16(kBlockRows * dim));
  }
  DenseKeys(const DensePassage& p, char* room)
      : p(p),
        k_tiles(reinterpret_cast<float*>(room)),
        v_tiles(k_tiles + kDenseKeys * p.a.head_dim),
        packed(v_tiles + kDenseKeys * p.width()) {}

  int64_t keys() const { return kDenseKeys; }
  int64_t start(int64_t j) const { return j / 16 * 16; }
  void queries(int64_t first, const RowTiles& tiles) {
    tile_rows = tiles.rows;
    pack_queries(p, first, tiles, packed);
  }
  void block(int64_t j, int64_t hi) {
    const memlm_attention_args& a = p.a;
    const int64_t count = hi - j < kDenseKeys ? hi - j : kDenseKeys;
    pack_turned(element(a.k, a.dtype, p.k_at(a.k_strides, j)), a.dtype, a.k_strides[2], count,
                a.head_dim, k_tiles);
    pack_straight(element(a.v, a.dtype, p.k_at(a.v_strides, j)), a.dtype, a.v_strides[2], count,
                  a.v_dim, kDenseKeys, v_tiles);
  }
  template <int MT>
  void scores(int64_t tile, int64_t first, int64_t blocks, float* s) const {
    const int64_t dim = p.a.head_dim;
    multiply<MT>(packed + tile * tile_rows * dim, 1, MT,
                 Tiles<float>{k_tiles + first * dim * 16, dim * 16}, blocks, dim, nullptr, s, kMostKeys);
  }
  template <int MT>
  void values(int64_t first, int64_t keys, const float* p_, const float* factors, float* out,
              int64_t width) const {
    multiply<MT>(p_, kMostKeys, 1, Tiles<float>{v_tiles + first * 16, kDenseKeys * 16}, width / 16,
                 keys, factors, out, width);
  }
};

inline memlm_status attention(const memlm_attention_args& a) {
  const int64_t members = DensePassage::members(a);
  return run_passages<DenseKeys>(
      a.batch, a.kv_heads * members, a.threads, [&](int64_t sequence, int64_t passage) {
        return DensePassage(a, sequence, passage / members, passage % members);
      });
}

}  // namespace MEMLM_ISA
}  // namespace memlm
