// Gradients of attention, with the probabilities computed again (arXiv:2205.14135, appendix B): with
// P = exp(S - lse), delta = rowsum(dO * O) and S the scores,
//
//     dV = P^T dO      dP = dO V^T      dS = P * (dP - delta)      dQ = scale dS K      dK = scale dS^T Q
//
// One thread takes the passages (rows as in attend-inl.h) of one sequence that read one key-value head, so
// that nobody else adds to its dK and dV.  A block of rows passes over blocks of keys:
//
//            keys ->                    The five products of one block of each, all by multiply(): S and
//        +-----+-----+                  dP for one register tile of rows after the other, turned into P
//   rows | P dS|     |                  and dS on the way; then dQ, by tiles of rows, and dV and dK, by
//        +-----+-----+                  tiles of keys.
//
// Where there are few key-value heads their blocks of rows are dealt out to parts, each with its own dK and
// dV, which are added in the end.
#pragma once
#include "attention-inl.h"

namespace memlm {
namespace MEMLM_ISA {

// Key-value heads are cut in parts where there are fewer of them, so that there are about as many parts.
constexpr int64_t kLeastParts = 4;
// Floats from one row of P to the next: with those of 128 keys alone, a column of P would lie in an
// eighth of the L1's sets.
constexpr int64_t kMatrixRow = kDenseKeys + 16;

// Where rows of a gradient are summed: row i at p + i * row.
struct Sums {
  float* p;
  int64_t row;
};

// Both operands of one block of rows, in both orders: turned[D][rows of a register tile] for each
// register tile, and straight, tile t of 16 columns [rows][16].
struct PackedRows {
  float *turned, *straight;
  int64_t dim, rows;

  static int64_t floats(int64_t dim) { return kBlockRows * (dim + round_up16(dim)); }
  PackedRows(float* room, int64_t dim, int64_t rows)
      : turned(room), straight(room + kBlockRows * dim), dim(dim), rows(rows) {}
  Tiles<float> columns(int64_t first_row) const { return {straight + first_row * 16, rows * 16}; }
  const float* tile(const RowTiles& tiles, int64_t t) const { return turned + t * tiles.rows * dim; }

  // Row i, `dim` numbers times `factor`.
  void set(const RowTiles& tiles, int64_t i, const void* from, memlm_dtype dtype, int64_t at, F factor) {
    const int64_t t = i / tiles.rows, mt = tiles.rows_of(t);
    float* to = turned + t * tiles.rows * dim + i % tiles.rows;
    for (int64_t c = 0; c < dim; c += 16) {
      const int64_t count = dim - c < 16 ? dim - c : 16;
      float* x = straight + c * rows + i * 16;
      f_store(x, f_mul(load_floats(from, dtype, at + c, count), factor));
      for (int64_t d = 0; d < count; ++d) to[(c + d) * mt] = x[d];
    }
  }
};

// What a thread works with.
struct BackwardRoom {
  Row* rows;
  float *lse, *delta;  // of the block's rows
  float *k_turned, *k_straight, *v_turned;
  float *p, *ds;  // [kBlockRows][kMatrixRow]
  float *dq;      // [kBlockRows][head_dim to the next 16]
  float *q, *grad;  // PackedRows

  static constexpr int64_t kRowBytes = kBlockRows * sizeof(Row);
  static int64_t bytes(const memlm_attention_args& a) {
    const int64_t dim = round_up16(a.head_dim), v_dim = round_up16(a.v_dim);
    const int64_t floats = 2 * round_up16(kBlockRows) + kDenseKeys * (2 * dim + v_dim) +
                           2 * kBlockRows * kMatrixRow + kBlockRows * dim +
                           PackedRows::floats(a.head_dim) + PackedRows::floats(a.v_dim);
    return (kRowBytes + 4 * floats + 63) / 64 * 64;
  }
  BackwardRoom(char* room, const memlm_attention_args& a) {
    const int64_t dim = round_up16(a.head_dim), v_dim = round_up16(a.v_dim);
    rows = reinterpret_cast<Row*>(room);
    float* next = reinterpret_cast<float*>(room + kRowBytes);
    const auto take = [&](int64_t floats) {
      float* here = next;
      next += floats;
      return here;
    };
    lse = take(round_up16(kBlockRows));
    delta = take(round_up16(kBlockRows));
    k_turned = take(kDenseKeys * dim);
    k_straight = take(kDenseKeys * dim);
    v_turned = take(kDenseKeys * v_dim);
    p = take(kBlockRows * kMatrixRow);
    ds = take(kBlockRows * kMatrixRow);
    dq = take(kBlockRows * dim);
    q = take(PackedRows::floats(a.head_dim));
    grad = take(PackedRows::floats(a.v_dim));
  }
};

// Scores s and dP of the keys j .. j + count - 1 become P (with dropout) and dS.
inline void softmax_gradient(const ScoreRules& rules, const Row& row, float lse, float delta, int64_t j,
                             int64_t count, float* s, float* dp, float* grad_mask) {
  const F base = f_set1(lse == -INFINITY ? INFINITY : lse), mean = f_set1(delta);
  if (rules.softcap <= 0 && !rules.biased && !rules.dropped && !grad_mask && j >= row.lo &&
      j + count <= row.hi) {
    for (int64_t i = 0; i < count; i += 16) {
      const F p = f_exp(f_sub(f_load(s + i), base));
      f_store(s + i, p);
      f_store(dp + i, f_mul(p, f_sub(f_load(dp + i), mean)));
    }
    return;
  }
  ScoreRules after_cap = rules;
  after_cap.softcap = 0;
  for (int64_t i = 0; i < count; i += 16) {
    F score = f_load(s + i), slope = f_set1(1);
    if (rules.softcap > 0) {
      score = f_softcap(score, rules.softcap);
      const F t = f_mul(score, f_set1(1 / rules.softcap));
      slope = f_sub(slope, f_mul(t, t));
    }
    F p = f_exp(f_sub(whole_score(after_cap, row, j + i, score), base));
    F grad = f_load(dp + i), kept = p;
    if (rules.dropped) {
      alignas(64) float factors[16];
      dropout_factors(row.dropout, j + i, rules.dropped, rules.kept, factors);
      kept = f_mul(p, f_load(factors));
      grad = f_mul(grad, f_load(factors));
    }
    grad = f_mul(p, f_sub(grad, mean));
    f_store(s + i, kept);
    f_store(dp + i, f_mul(grad, slope));
    if (grad_mask) {
      const int64_t left = row.hi - (j + i);
      alignas(64) float some[16];
      f_store(some, grad);
      if (left > 0) memcpy(grad_mask + j + i, some, sizeof(float) * (left < 16 ? left : 16));
    }
  }
}

// delta of the row that begins at these elements of grad_out and out.
inline float row_delta(const memlm_attention_args& a, const memlm_attention_grads& g, int64_t grad_at,
                       int64_t out_at) {
  F sum = f_zero();
  for (int64_t c = 0; c < a.v_dim; c += 16) {
    const int64_t count = a.v_dim - c < 16 ? a.v_dim - c : 16;
    sum = f_fma(load_floats(g.grad_out, a.dtype, grad_at + c, count),
                load_floats(a.out, a.dtype, out_at + c, count), sum);
  }
  return f_reduce_add(sum);
}

class BackwardPassage {
  const memlm_attention_args& a;
  const memlm_attention_grads& g;
  const DensePassage passage;
  BackwardRoom room;
  const int64_t dim, width;  // of the sums of q and k, and of v
  Sums dk, dv;

 public:
  BackwardPassage(const memlm_attention_args& a, const memlm_attention_grads& g, const DensePassage& p,
                  char* room, Sums dk, Sums dv)
      : a(a), g(g), passage(p), room(room, a), dim(round_up16(a.head_dim)),
        width(round_up16(a.v_dim)), dk(dk), dv(dv) {}

  // The rows from r0 on, as many as a block has.
  void block(int64_t r0) {
    const int64_t left = passage.rows() - r0, most = passage.block_rows();
    const int64_t count = left < most ? left : most;
    const RowTiles tiles = RowTiles::even(count, kTileM);
    PackedRows q(room.q, a.head_dim, count), grad(room.grad, a.v_dim, count);
    for (int64_t r = 0; r < count; ++r) {
      room.rows[r] = passage.row(r0 + r);
      room.lse[r] = a.lse[passage.lse_at(r0 + r)];
      const int64_t grad_at = passage.q_at(g.grad_out_strides, r0 + r);
      room.delta[r] = row_delta(a, g, grad_at, passage.q_at(a.out_strides, r0 + r));
      q.set(tiles, r, a.q, a.dtype, passage.q_at(a.q_strides, r0 + r), f_set1(a.scale));
      grad.set(tiles, r, g.grad_out, a.dtype, grad_at, f_set1(1));
      if (g.grad_mask) memset(mask_row(r0 + r), 0, sizeof(float) * passage.k_len);
    }
    memset(room.dq, 0, sizeof(float) * count * dim);
    passage.runs(r0, room.rows[0].lo, room.rows[count - 1].hi, [&](int64_t lo, int64_t hi) {
      for (int64_t j = lo / 16 * 16; j < hi; j += kDenseKeys)
        with_keys(r0, tiles, q, grad, j, hi - j < kDenseKeys ? hi - j : kDenseKeys);
    });
    alignas(64) float some[kMostHeadDim];
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t c = 0; c < dim; c += 16)
        f_store(some + c, f_mul(f_load(room.dq + r * dim + c), f_set1(a.scale)));
      store_floats(g.grad_q, a.dtype, passage.q_at(g.grad_q_strides, r0 + r), a.head_dim, some);
    }
  }

 private:
  float* mask_row(int64_t row) const { return g.grad_mask + passage.lse_at(row) * a.k_len; }

  // A tile of keys may begin before what a row sees, and end after it.
  static void clear_outside(float* row, int64_t from, int64_t to) {
    memset(row, 0, sizeof(float) * from);
    memset(row + to, 0, sizeof(float) * (kMatrixRow - to));
  }

  void with_keys(int64_t r0, const RowTiles& tiles, const PackedRows& q, const PackedRows& grad,
                 int64_t j, int64_t keys) {
    const ScoreRules rules = passage.rules();
    const char* k = element(a.k, a.dtype, passage.k_at(a.k_strides, j));
    const char* v = element(a.v, a.dtype, passage.k_at(a.v_strides, j));
    pack_turned(k, a.dtype, a.k_strides[2], keys, a.head_dim, room.k_turned);
    pack_straight(k, a.dtype, a.k_strides[2], keys, a.head_dim, kDenseKeys, room.k_straight);
    pack_turned(v, a.dtype, a.v_strides[2], keys, a.v_dim, room.v_turned);
    float ones[kTileM];
    for (float& one : ones) one = 1;

    // The rows in which a tile of keys has anything: from first[.] to end[.].  They are in the order
    // of their positions.
    const RowTiles key_tiles = RowTiles::even(keys, kTileM);
    int64_t first[kDenseKeys], end[kDenseKeys] = {};
    for (int64_t t = 0; t < tiles.count; ++t) {
      const int64_t r = t * tiles.rows;
      const int mt = tiles.rows_of(t);
      const Row* row = room.rows + r;
      int64_t from = row[0].lo - j, to = row[mt - 1].hi - j;
      from = from > 0 ? from / 16 * 16 : 0;
      to = to < keys ? to : keys;
      if (from >= to) continue;
      const int64_t blocks = div_up(to - from, 16), rounded = from + blocks * 16;
      float *p = room.p + r * kMatrixRow, *ds = room.ds + r * kMatrixRow;
      with_rows(mt, [&](auto n) {
        constexpr int MT = n.value;
        multiply<MT>(q.tile(tiles, t), 1, MT,
                     Tiles<float>{room.k_turned + from * a.head_dim, a.head_dim * 16}, blocks, a.head_dim,
                     nullptr, p + from, kMatrixRow);
        multiply<MT>(grad.tile(tiles, t), 1, MT, Tiles<float>{room.v_turned + from * a.v_dim, a.v_dim * 16},
                     blocks, a.v_dim, nullptr, ds + from, kMatrixRow);
        for (int m = 0; m < MT; ++m) {
          float *p_row = p + m * kMatrixRow, *ds_row = ds + m * kMatrixRow;
          softmax_gradient(rules, row[m], room.lse[r + m], room.delta[r + m], j + from, blocks * 16,
                           p_row + from, ds_row + from, g.grad_mask ? mask_row(r0 + r + m) : nullptr);
          clear_outside(p_row, from, rounded);
          clear_outside(ds_row, from, rounded);
        }
        multiply<MT>(ds + from, kMatrixRow, 1, Tiles<float>{room.k_straight + from * 16, kDenseKeys * 16},
                     dim / 16, to - from, ones, room.dq + r * dim, dim);
      });
      for (int64_t i = from / key_tiles.rows; i < key_tiles.count && i * key_tiles.rows < to; ++i) {
        if (end[i] == 0) first[i] = r;
        end[i] = r + mt;
      }
    }
    for (int64_t i = 0; i < key_tiles.count; ++i) {
      if (end[i] == 0) continue;
      const int64_t key = i * key_tiles.rows, rows = end[i] - first[i];
      const int64_t at = first[i] * kMatrixRow + key;
      with_rows(key_tiles.rows_of(i), [&](auto n) {
        constexpr int MT = n.value;
        multiply<MT>(room.p + at, 1, kMatrixRow, grad.columns(first[i]), width / 16, rows, ones,
                     dv.p + (j + key) * dv.row, dv.row);
        multiply<MT>(room.ds + at, 1, kMatrixRow, q.columns(first[i]), dim / 16, rows, ones,
                     dk.p + (j + key) * dk.row, dk.row);
      });
    }
  }
};

// Of every sink: its probability is that of a score without value.
inline void sink_gradients(const memlm_attention_args& a, const memlm_attention_grads& g) {
  parallel_for(a.heads, 1, a.threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t h = begin; h < end; ++h) {
      double sum = 0;
      for (int64_t b = 0; b < (a.q_offsets ? 1 : a.batch); ++b)
        for (int64_t i = 0; i < a.q_len; ++i) {
          const auto at = [&](const int64_t* strides) {
            return b * strides[0] + h * strides[1] + i * strides[2];
          };
          const float share = expf(a.sinks[h] - a.lse[(b * a.heads + h) * a.q_len + i]);
          sum -= share * row_delta(a, g, at(g.grad_out_strides), at(a.out_strides));
        }
      g.grad_sinks[h] = static_cast<float>(sum);
    }
  });
}

inline memlm_status attention_backward(const memlm_attention_args& a, const memlm_attention_grads& g) {
  const int64_t dim = round_up16(a.head_dim), width = round_up16(a.v_dim);
  const int64_t members = DensePassage::members(a);
  int64_t row_blocks = 0, most_keys = 0;
  for (int64_t b = 0; b < a.batch; ++b) {
    const DensePassage p(a, b, 0, 0);
    const int64_t blocks = members * div_up(p.rows(), p.block_rows());
    if (blocks > row_blocks) row_blocks = blocks;
    if (p.k_len > most_keys) most_keys = p.k_len;
  }
  const int64_t kv_heads = a.batch * a.kv_heads;
  int64_t parts = kv_heads && kv_heads < kLeastParts ? div_up(kLeastParts, kv_heads) : 1;
  if (parts > row_blocks) parts = row_blocks ? row_blocks : 1;
  // Rows of sums that are rows of the result need no place of their own.
  const bool direct = a.dtype == MEMLM_F32 && parts == 1 && dim == a.head_dim && width == a.v_dim;
  const int64_t sums_floats = direct ? 0 : most_keys * (dim + width);
  const int64_t room_bytes = BackwardRoom::bytes(a);
  const Buffer rooms(room_bytes * a.threads);
  const Buffer sums(4 * sums_floats * (parts > 1 ? kv_heads * parts : a.threads));
  if (!rooms.p || !sums.p) return MEMLM_NO_MEMORY;
  if (g.grad_sinks) sink_gradients(a, g);

  const auto passage = [&](int64_t i, int64_t member = 0) {
    return DensePassage(a, i / a.kv_heads, i % a.kv_heads, member);
  };
  const auto sums_at = [&](int64_t i) { return static_cast<float*>(sums.p) + i * sums_floats; };
  // Key i of the results from `parts` sums.
  const auto store = [&](const DensePassage& p, int64_t i, int64_t count, const float* first) {
    alignas(64) float some[kMostHeadDim];
    const auto total = [&](const float* row, int64_t columns) {
      for (int64_t c = 0; c < columns; c += 16) {
        F sum = f_load(row + c);
        for (int64_t part = 1; part < count; ++part) sum = f_add(sum, f_load(row + part * sums_floats + c));
        f_store(some + c, sum);
      }
    };
    total(first + i * dim, dim);
    store_floats(g.grad_k, a.dtype, p.k_at(g.grad_k_strides, i), a.head_dim, some);
    total(first + most_keys * dim + i * width, width);
    store_floats(g.grad_v, a.dtype, p.k_at(g.grad_v_strides, i), a.v_dim, some);
  };

  parallel_for(kv_heads * parts, 1, a.threads, [&](int64_t begin, int64_t end, int slot) {
    char* const room = static_cast<char*>(rooms.p) + slot * room_bytes;
    for (int64_t i = begin; i < end; ++i) {
      const DensePassage p = passage(i / parts);
      float* const own = sums_at(parts > 1 ? i : slot);
      Sums dk = {own, dim}, dv = {own + most_keys * dim, width};
      if (direct) {
        dk = {static_cast<float*>(g.grad_k) + p.k_at(g.grad_k_strides, 0), g.grad_k_strides[2]};
        dv = {static_cast<float*>(g.grad_v) + p.k_at(g.grad_v_strides, 0), g.grad_v_strides[2]};
      }
      for (int64_t key = 0; key < p.k_len; ++key) {
        memset(dk.p + key * dk.row, 0, sizeof(float) * dim);
        memset(dv.p + key * dv.row, 0, sizeof(float) * width);
      }
      int64_t block = 0;  // of all passages
      for (int64_t member = 0; member < members; ++member) {
        BackwardPassage work(a, g, passage(i / parts, member), room, dk, dv);
        for (int64_t r0 = 0; r0 < p.rows(); r0 += p.block_rows())
          if (block++ % parts == i % parts) work.block(r0);
      }
      if (!direct && parts == 1)
        for (int64_t key = 0; key < p.k_len; ++key) store(p, key, 1, own);
    }
  });
  if (parts > 1) {
    parallel_for(kv_heads * most_keys, 64, a.threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        const DensePassage p = passage(i / most_keys);
        if (i % most_keys < p.k_len) store(p, i % most_keys, parts, sums_at(i / most_keys * parts));
      }
    });
  }
  return MEMLM_OK;
}

}  // namespace MEMLM_ISA
}  // namespace memlm
