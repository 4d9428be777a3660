// attention: over keys and values that lie in plain tensors.
#pragma once
#include "attend-inl.h"

namespace memlm {
namespace MEMLM_ISA {

constexpr int kDenseKeys = 128;                // keys per block: with heads of 128, 64 KB of an L2
constexpr int kBlockRows = 16 * kTileM;        // rows that pass together over a block, once it is packed
// Passages are cut in parts where a call has fewer of them than this.
constexpr int64_t kFewPassages = 16;

inline int64_t element_size(memlm_dtype dtype) { return dtype == MEMLM_F32 ? 4 : 2; }

inline const char* element(const void* base, memlm_dtype dtype, int64_t i) {
  return static_cast<const char*>(base) + i * element_size(dtype);
}

inline int64_t round_up16(int64_t x) { return (x + 15) / 16 * 16; }

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

// One sequence of one key-value head.
struct Passage {
  const memlm_attention_args& a;
  int64_t batch, kv_head, group;
  int64_t q_len, k_len, q_first, k_first;  // the sequence's part of the tensors

  Passage(const memlm_attention_args& args, int64_t sequence, int64_t head)
      : a(args), batch(args.q_offsets ? 0 : sequence), kv_head(head), group(args.heads / args.kv_heads) {
    q_first = a.q_offsets ? a.q_offsets[sequence] : 0;
    k_first = a.q_offsets ? a.k_offsets[sequence] : 0;
    q_len = a.q_offsets ? a.q_offsets[sequence + 1] - q_first : a.q_len;
    k_len = a.q_offsets ? a.k_offsets[sequence + 1] - k_first : a.k_len;
    sequence_ = sequence;
  }
  int64_t rows() const { return q_len * group; }
  int64_t head(int64_t row) const { return kv_head * group + row % group; }
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
inline void pack_queries(const Passage& p, int64_t r0, const RowTiles& tiles, float* to) {
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

struct DenseKeys {
  const Passage& p;
  const float* queries;  // pack_queries
  const RowTiles& tiles;
  float *k_tiles, *v_tiles;

  static int64_t k_floats(int64_t dim) { return kDenseKeys * dim; }
  static int64_t v_floats(int64_t dim) { return kDenseKeys * round_up16(dim); }

  int64_t keys() const { return kDenseKeys; }
  void block(int64_t j) {
    const memlm_attention_args& a = p.a;
    const int64_t count = p.k_len - j < kDenseKeys ? p.k_len - j : kDenseKeys;
    pack_turned(element(a.k, a.dtype, p.k_at(a.k_strides, j)), a.dtype, a.k_strides[2], count,
                a.head_dim, k_tiles);
    pack_straight(element(a.v, a.dtype, p.k_at(a.v_strides, j)), a.dtype, a.v_strides[2], count,
                  a.v_dim, kDenseKeys, v_tiles);
  }
  template <int MT>
  void scores(int64_t tile, int64_t first, int64_t blocks, float* s) const {
    const int64_t dim = p.a.head_dim;
    multiply<MT>(queries + tile * tiles.rows * dim, 1, MT,
                 Tiles<float>{k_tiles + first * dim * 16, dim * 16}, blocks, dim, nullptr, s, kMostKeys);
  }
  template <int MT>
  void values(int64_t first, int64_t keys, const float* p_, const float* factors, float* out,
              int64_t width) const {
    multiply<MT>(p_, kMostKeys, 1, Tiles<float>{v_tiles + first * 16, kDenseKeys * 16}, width / 16,
                 keys, factors, out, width);
  }
};

// Which passages, cut into blocks of rows, a call consists of.
struct Blocks {
  int64_t *first;  // [batch + 1]: blocks of the sequences before, of one head
  int64_t batch, kv_heads, total;
  Buffer buffer;

  explicit Blocks(const memlm_attention_args& a)
      : batch(a.batch), kv_heads(a.kv_heads), buffer((a.batch + 1) * 8) {
    first = static_cast<int64_t*>(buffer.p);
    if (!first) return;
    first[0] = 0;
    for (int64_t b = 0; b < batch; ++b)
      first[b + 1] = first[b] + div_up(Passage(a, b, 0).rows(), kBlockRows);
    total = first[batch] * kv_heads;
  }
  struct Place { int64_t sequence, head, block; };
  // The last blocks first: with causal attention they take longest.
  Place place(int64_t i) const {
    i = total - 1 - i;
    int64_t lo = 0, hi = batch - 1;
    while (lo < hi) {  // the sequence with first[b] * kv_heads <= i < first[b + 1] * kv_heads
      const int64_t mid = (lo + hi) / 2;
      if (first[mid + 1] * kv_heads <= i) lo = mid + 1;
      else hi = mid;
    }
    i -= first[lo] * kv_heads;
    const int64_t blocks = first[lo + 1] - first[lo];
    return {lo, i % kv_heads, i / kv_heads % blocks};
  }
};

inline memlm_status attention(const memlm_attention_args& a) {
  const Blocks blocks(a);
  if (!blocks.first) return MEMLM_NO_MEMORY;
  if (blocks.total == 0) return MEMLM_OK;
  const bool cut = blocks.total < kFewPassages;
  const int64_t parts = cut ? kMostParts : 1, width = round_up16(a.v_dim);
  const int64_t so_far = Progress::floats(kBlockRows, width);
  const int64_t row_bytes = kBlockRows * static_cast<int64_t>(sizeof(Row));
  const int64_t slot = row_bytes + 4 * (kBlockRows * a.head_dim + DenseKeys::k_floats(a.head_dim) +
                                        DenseKeys::v_floats(a.v_dim) + kTileM * kMostKeys + width);
  const int64_t slot_bytes = (slot + 63) / 64 * 64;
  const Buffer slots(slot_bytes * a.threads);
  const Buffer progress(4 * so_far * parts * (cut ? blocks.total : a.threads));
  if (!slots.p || !progress.p) return MEMLM_NO_MEMORY;

  struct Work {
    Row* rows;
    float *queries, *k_tiles, *v_tiles, *scores, *out;
  };
  const auto work_of = [&](int slot) {
    Work w;
    w.k_tiles = reinterpret_cast<float*>(static_cast<char*>(slots.p) + slot * slot_bytes);
    w.v_tiles = w.k_tiles + DenseKeys::k_floats(a.head_dim);
    w.scores = w.v_tiles + DenseKeys::v_floats(a.v_dim);
    w.out = w.scores + kTileM * kMostKeys;
    w.queries = w.out + width;
    w.rows = reinterpret_cast<Row*>(w.queries + kBlockRows * a.head_dim);
    return w;
  };
  const auto progress_of = [&](int64_t i) {
    return Progress::at(static_cast<float*>(progress.p) + i * so_far, kBlockRows, width);
  };
  const auto rows_of = [&](const Passage& p, int64_t r0) {
    const int64_t left = p.rows() - r0;
    return left < kBlockRows ? left : kBlockRows;
  };
  // Keys [lo, hi) that rows see, in parts that begin at multiples of a size.
  struct Span { int64_t lo, hi, size, parts; };
  const auto span_of = [&](const Passage& p, int64_t r0, int64_t count) {
    const int64_t lo = p.row(r0).lo, hi = p.row(r0 + count - 1).hi;
    if (!cut || hi <= lo) return Span{lo, hi, hi > 0 ? hi : 1, 1};
    const int64_t size = part_keys(hi - lo);
    return Span{lo, hi, size, div_up(hi, size) - lo / size};
  };
  const auto finish = [&](const Passage& p, int64_t r0, int64_t count, const Progress& so_far_,
                          int64_t parts_, float* out) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = r0 + i;
      const float sink = a.sinks ? a.sinks[p.head(row)] : -INFINITY;
      a.lse[p.lse_at(row)] = finish_row(so_far_, i, parts_, so_far, sink, out);
      store_floats(a.out, a.dtype, p.q_at(a.out_strides, row), a.v_dim, out);
    }
  };

  parallel_for(blocks.total * parts, 1, a.threads, [&](int64_t begin, int64_t end, int slot) {
    const Work w = work_of(slot);
    for (int64_t i = begin; i < end; ++i) {
      const Blocks::Place at = blocks.place(i / parts);
      const Passage p(a, at.sequence, at.head);
      const int64_t r0 = at.block * kBlockRows, count = rows_of(p, r0);
      const Span span = span_of(p, r0, count);
      const int64_t part = i % parts;
      if (part >= span.parts) continue;
      const RowTiles tiles = RowTiles::even(count, kTileM);
      for (int64_t r = 0; r < count; ++r) w.rows[r] = p.row(r0 + r);
      pack_queries(p, r0, tiles, w.queries);
      DenseKeys keys{p, w.queries, tiles, w.k_tiles, w.v_tiles};
      const Progress here = progress_of(cut ? i : slot);
      here.start(count);
      const int64_t from = (span.lo / span.size + part) * span.size;
      attend(keys, p.rules(), w.rows, tiles, from > span.lo ? from : span.lo,
             from + span.size < span.hi ? from + span.size : span.hi, here, w.scores);
      if (!cut) finish(p, r0, count, here, 1, w.out);
    }
  });
  if (cut) {
    parallel_for(blocks.total, 1, a.threads, [&](int64_t begin, int64_t end, int slot) {
      const Work w = work_of(slot);
      for (int64_t i = begin; i < end; ++i) {
        const Blocks::Place at = blocks.place(i);
        const Passage p(a, at.sequence, at.head);
        const int64_t r0 = at.block * kBlockRows, count = rows_of(p, r0);
        finish(p, r0, count, progress_of(i * parts), span_of(p, r0, count).parts, w.out);
      }
    });
  }
  return MEMLM_OK;
}

}  // namespace MEMLM_ISA
}  // namespace memlm
