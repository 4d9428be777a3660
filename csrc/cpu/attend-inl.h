// What all attention has in common: rows of queries pass over blocks of keys and values with an online
// softmax (arXiv:1805.02867): each row keeps the largest score so far, the sum of the exponentials
// relative to it, and the values weighted with them.
//
// The query heads that share a key-value head are rows of one matrix, which reads keys and values
// once for all of them:
//
//     row = query * group + head in the group        group = heads / kv_heads
//
// Rows go in register tiles of up to kTileM.  Scores of a register tile with one block of keys stay in
// the L1 between the two products.
#pragma once
#include <math.h>
#include <string.h>

#include "../formats.h"
#include "../include/memlm.h"
#include "../kv_blocks.h"
#include "dropout.h"
#include "matmul-inl.h"

namespace memlm {
namespace MEMLM_ISA {

// Most keys in a block: the scores of a register tile take 12 KB with AVX-512.
constexpr int kMostKeys = kMostKvTokens;

inline int64_t round_up16(int64_t x) { return (x + 15) / 16 * 16; }

inline F load_elements(const float* p) { return f_load(p); }
inline F load_elements(const uint16_t* p) { return f_load_bf16(p); }  // only bf16 is stored as it is

// A matrix B [k][16 n] for multiply: tile t holds [k][16] at b + t * tile.
template <class T>
struct Tiles {
  const T* b;
  int64_t tile;
};

// Up to so many rows of a, b is read faster than it can come from memory: it is read in one stream,
// asked for in advance (weights-inl.h, prefetch).
constexpr int kStreamRows = 8;

// c[MT][NT * 16] = c * factor + a b, where a[m][k] lies at a + m * a_row + k * a_k.  factor [MT];
// NULL: c = a b.
template <int MT, int NT, class T>
__attribute__((always_inline))  // a_row and a_k are constants of most callers: up to 1.15 times as fast
inline void multiply_tile(const float* a, int64_t a_row, int64_t a_k, const Tiles<T>& b, int64_t k,
                          const float* factor, float* c, int64_t c_row) {
  F sums[MT][NT];
  for (int m = 0; m < MT; ++m)
    for (int n = 0; n < NT; ++n)
      sums[m][n] = factor ? f_mul(f_load(c + m * c_row + n * 16), f_set1(factor[m])) : f_zero();
#pragma GCC unroll 1
  for (int64_t i = 0; i < k; ++i) {
    F weights[NT];
    for (int n = 0; n < NT; ++n) weights[n] = load_elements(b.b + n * b.tile + i * 16);
    if (MT <= kStreamRows && (sizeof(T) == 4 || i % 2 == 0))
      prefetch(reinterpret_cast<const uint8_t*>(b.b + i * 16), kBlock);
    for (int m = 0; m < MT; ++m) {
      const F x = f_set1(a[m * a_row + i * a_k]);
      for (int n = 0; n < NT; ++n) sums[m][n] = f_fma(x, weights[n], sums[m][n]);
    }
  }
  for (int m = 0; m < MT; ++m)
    for (int n = 0; n < NT; ++n) f_store(c + m * c_row + n * 16, sums[m][n]);
}

// The same for any number of tiles of b.
template <int MT, class T>
__attribute__((always_inline))
inline void multiply(const float* a, int64_t a_row, int64_t a_k, Tiles<T> b, int64_t tiles, int64_t k,
                     const float* factor, float* c, int64_t c_row) {
  constexpr int kWide = MT <= kStreamRows ? 1 : kWideTiles;
  int64_t n = 0;
  for (; n + kWide <= tiles; n += kWide, b.b += kWide * b.tile)
    multiply_tile<MT, kWide>(a, a_row, a_k, b, k, factor, c + n * 16, c_row);
  if constexpr (kWide > 1) {
    for (; n < tiles; ++n, b.b += b.tile)
      multiply_tile<MT, 1>(a, a_row, a_k, b, k, factor, c + n * 16, c_row);
  }
}

// What happens to scores, and where a row's keys are.
struct ScoreRules {
  float softcap;    // 0: none
  bool biased;      // there is a mask or a slope
  int mask_is_bool;
  memlm_dtype dtype;  // of the mask
  int64_t mask_stride;  // in elements, from key to key
  uint32_t dropped;   // hashes below are dropped; 0: none
  float kept;         // what is not dropped is multiplied with
};

struct Row {
  int64_t lo, hi;    // the keys it sees
  int64_t position;  // beside the keys'
  float slope;
  const char* mask;  // of key 0, or NULL
  uint32_t dropout;  // dropout_row
};

// lanes 0..15 as numbers
inline F lanes() {
  alignas(64) static const float numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return f_load(numbers);
}

inline F f_softcap(F s, float cap) {  // cap * tanh(s / cap)
  const F e = f_exp(f_mul(s, f_set1(2 / cap)));
  const F t = f_sub(f_set1(1), f_div(f_set1(2), f_add(e, f_set1(1))));
  return f_mul(t, f_set1(cap));
}

// The mask's part in the scores of keys j .. j + 15, count of which exist.
inline F mask_values(const ScoreRules& rules, const Row& row, int64_t j, int64_t count) {
  alignas(64) float values[16] = {};
  if (rules.mask_is_bool) {
    for (int i = 0; i < count; ++i) values[i] = row.mask[(j + i) * rules.mask_stride] ? 0 : -INFINITY;
    return f_load(values);
  }
  if (rules.mask_stride == 1) return load_floats(row.mask, rules.dtype, j, count);
  for (int i = 0; i < count; ++i) {
    alignas(64) float one[16];
    f_store(one, load_floats(row.mask, rules.dtype, (j + i) * rules.mask_stride, 1));
    values[i] = one[0];
  }
  return f_load(values);
}

// The score, with all that belongs to it, of keys j .. j + 15; -Inf for those that the row does not
// see.
inline F whole_score(const ScoreRules& rules, const Row& row, int64_t j, F s) {
  if (rules.softcap > 0) s = f_softcap(s, rules.softcap);
  if (rules.biased) {
    if (row.slope != 0) {
      const F right = f_add(lanes(), f_set1(static_cast<float>(j - row.position)));
      s = f_fma(f_max(right, f_sub(f_zero(), right)), f_set1(-row.slope), s);
    }
    if (row.mask) {
      const int64_t left = row.hi - j;
      if (left > 0) s = f_add(s, mask_values(rules, row, j, left < 16 ? left : 16));
    }
  }
  if (j < row.lo)
    s = f_if_less(lanes(), f_set1(static_cast<float>(row.lo - j)), f_set1(-INFINITY), s);
  if (j + 16 > row.hi)
    s = f_if_less(lanes(), f_set1(static_cast<float>(row.hi - j)), s, f_set1(-INFINITY));
  return s;
}

// Scores of MT rows, kMostKeys apart, with keys j .. j + count - 1 (count a multiple of 16) become weights
// relative to each row's largest so far; max and sum [MT] follow.  factors [MT]: what earlier weights are
// to be multiplied with.
template <int MT>
inline void soften(const ScoreRules& rules, const Row* rows, int64_t j, int64_t count, float* scores,
                   float* max, float* sum, float* factors) {
  // All rows take each step together: their reductions, which take long, then overlap.
  float bases[MT];
  for (int m = 0; m < MT; ++m) {
    float* const s = scores + m * kMostKeys;
    const Row& row = rows[m];
    const bool plain = rules.softcap <= 0 && !rules.biased && j >= row.lo && j + count <= row.hi;
    for (int64_t i = 0; !plain && i < count; i += 16)
      f_store(s + i, whole_score(rules, row, j + i, f_load(s + i)));
    F most = f_set1(max[m]);
    for (int64_t i = 0; i < count; i += 16) most = f_max(most, f_load(s + i));
    const float now = f_reduce_max(most);
    bases[m] = now == -INFINITY ? 0 : now;
    factors[m] = max[m] == now ? 1 : expf(max[m] - bases[m]);
    max[m] = now;
  }
  for (int m = 0; m < MT; ++m) {
    float* const s = scores + m * kMostKeys;
    const F base = f_set1(bases[m]);
    F total = f_zero();
    for (int64_t i = 0; i < count; i += 16) {
      const F weight = f_exp(f_sub(f_load(s + i), base));
      f_store(s + i, weight);
      total = f_add(total, weight);
    }
    sum[m] = sum[m] * factors[m] + f_reduce_add(total);
  }
  for (int m = 0; rules.dropped && m < MT; ++m)
    for (int64_t i = 0; i < count; i += 16) {
      float* const s = scores + m * kMostKeys + i;
      alignas(64) float kept[16];
      dropout_factors(rows[m].dropout, j + i, rules.dropped, rules.kept, kept);
      f_store(s, f_mul(f_load(s), f_load(kept)));
    }
}

// Where rows stand in their passage: [rows] largest score, sum, and values [rows][width].
struct Progress {
  float *max, *sum, *values;
  int64_t width;  // a multiple of 16

  static int64_t floats(int64_t rows, int64_t width) { return round_up16(2 * rows) + rows * width; }
  static Progress at(float* p, int64_t rows, int64_t width) {
    return {p, p + rows, p + round_up16(2 * rows), width};
  }
  void start(int64_t rows) const {
    for (int64_t i = 0; i < rows; ++i) {
      max[i] = -INFINITY;
      sum[i] = 0;
    }
    memset(values, 0, sizeof(float) * rows * width);
  }
};

// Takes rows [0, count) past the keys lo .. hi - 1.  Keys is where keys come from:
//   start(j): where a block that has key j may begin, a multiple of 16
//   block(j, hi): makes the block that begins at key j ready, but for the keys from hi on; keys() in a
//     block
//   scores<MT>(tile, first, tiles, s): of the register tile's rows with the block's keys from 16 * first
//     on, to s [MT][kMostKeys]
//   values<MT>(first, keys, p, factor, out, width): out = out * factor + p V
template <class Keys>
void attend(Keys& keys, const ScoreRules& rules, const Row* rows, const RowTiles& tiles, int64_t lo,
            int64_t hi, const Progress& so_far, float* scores) {
  const int64_t size = keys.keys();
  for (int64_t j = keys.start(lo); j < hi; j += size) {
    keys.block(j, hi);
    for (int64_t t = 0; t < tiles.count; ++t) {
      const int mt = tiles.rows_of(t);
      const Row* row = rows + t * tiles.rows;
      // Rows are in the order of their positions: the first sees the first key, the last the last.
      int64_t begin = row[0].lo, end = row[mt - 1].hi;
      begin = (begin > lo ? begin : lo) - j;
      end = (end < hi ? end : hi) - j;
      begin = begin > 0 ? begin / 16 * 16 : 0;
      if (end > size) end = size;
      if (begin >= end) continue;
      const int64_t blocks = div_up(end - begin, 16);
      float factors[kTileM];
      with_rows(mt, [&](auto n) {
        constexpr int MT = n.value;
        keys.template scores<MT>(t, begin / 16, blocks, scores);
        const Progress at = {so_far.max + t * tiles.rows, so_far.sum + t * tiles.rows,
                             so_far.values + t * tiles.rows * so_far.width, so_far.width};
        soften<MT>(rules, row, j + begin, blocks * 16, scores, at.max, at.sum, factors);
        keys.template values<MT>(begin, end - begin, scores, factors, at.values, at.width);
      });
    }
  }
}

constexpr int kBlockRows = 16 * kTileM;  // rows that pass together over a block of keys
constexpr int kMostParts = 17;           // 16 whole ones that need not begin at a boundary

// The keys that some rows see, in parts.  A passage of few rows is cut in parts, for threads to share
// it, by a rule that looks at the passage alone: a result must not depend on what else is computed.
struct Span {
  int64_t lo, hi, size, parts;

  static bool is_cut(int64_t passage_rows) { return passage_rows <= 2 * kTileM; }
  Span(int64_t passage_rows, int64_t lo, int64_t hi) : lo(lo), hi(hi), size(hi > 0 ? hi : 1), parts(1) {
    if (hi <= lo || !is_cut(passage_rows)) return;
    size = 128;
    while (size * (kMostParts - 1) < hi - lo) size *= 2;
    parts = div_up(hi, size) - lo / size;
  }
  int64_t begin(int64_t part) const {
    const int64_t at = (lo / size + part) * size;
    return at > lo ? at : lo;
  }
  int64_t end(int64_t part) const {
    const int64_t at = (lo / size + part + 1) * size;
    return at < hi ? at : hi;
  }
};

// The result of a row from its parts, which lie `next` floats apart: [width] values to out; returns
// the log of the sum.
inline float finish_row(const Progress& first, int64_t row, int64_t parts, int64_t next, float sink,
                        float* out) {
  float max = sink;
  for (int64_t i = 0; i < parts; ++i) {
    const float m = first.max[row + i * next];
    max = m > max || m != m ? m : max;
  }
  const float base = max == -INFINITY ? 0 : max;
  float sum = expf(sink - base), factors[kMostParts];
  for (int64_t i = 0; i < parts; ++i) {
    factors[i] = expf(first.max[row + i * next] - base);
    sum += first.sum[row + i * next] * factors[i];
  }
  const float inverse = sum == 0 ? 0 : 1 / sum;
  for (int64_t c = 0; c < first.width; c += 16) {
    F total = f_zero();
    for (int64_t i = 0; i < parts; ++i)
      total = f_fma(f_load(first.values + i * next + row * first.width + c), f_set1(factors[i]), total);
    f_store(out + c, f_mul(total, f_set1(inverse)));
  }
  return sum == 0 ? -INFINITY : max + logf(sum);
}

// The passages of a call, one for each sequence and key-value head, cut into blocks of rows, and those
// of cut passages into parts.
//
// Passage, of one sequence and head: rows(); row(i) -> Row, in the order of positions; rules();
//   sink(i); width(), a multiple of 16; store(i, log of the sum, values);
//   block_rows(): so many rows make a block, all those of a cut passage and at most kBlockRows;
//   runs(r0, lo, hi, use): use(begin, end) for each run of keys of lo .. hi - 1 that is not hidden from
//     all rows of the block that begins at r0; begins and ends inside are multiples of 16
// Keys(passage, room): as attend wants it, with queries(first, tiles), which makes the rows of a block
//   ready; static bytes(passage) of room, a multiple of 64
// make(sequence, head) -> Passage
template <class Keys, class Make>
memlm_status run_passages(int64_t sequences, int64_t kv_heads, int threads, const Make& make) {
  struct Sequence {
    int64_t first;   // blocks of the sequences before, of one head
    int64_t floats;  // of the progress of those of them that are cut
    int64_t parts;
  };
  const Buffer list((sequences + 1) * sizeof(Sequence));
  Sequence* const s = static_cast<Sequence*>(list.p);
  if (!s) return MEMLM_NO_MEMORY;
  s[0].first = s[0].floats = 0;
  int64_t most_parts = 1;
  bool any_cut = false;
  for (int64_t b = 0; b < sequences; ++b) {
    const auto passage = make(b, 0);
    const int64_t rows = passage.rows();
    s[b].parts = 1;
    s[b + 1] = {s[b].first + div_up(rows, passage.block_rows()), s[b].floats, 1};
    if (rows == 0 || !Span::is_cut(rows)) continue;
    any_cut = true;
    s[b].parts = Span(rows, passage.row(0).lo, passage.row(rows - 1).hi).parts;
    s[b + 1].floats += s[b].parts * Progress::floats(rows, passage.width());
    if (s[b].parts > most_parts) most_parts = s[b].parts;
  }
  const int64_t total = s[sequences].first * kv_heads;
  if (total == 0) return MEMLM_OK;
  const auto any = make(0, 0);
  const int64_t width = any.width(), whole = Progress::floats(kBlockRows, width);
  const int64_t slot_floats = (kTileM * kMostKeys + width + whole + 15) / 16 * 16;
  const int64_t slot_bytes = slot_floats * 4 + (kBlockRows * sizeof(Row) + 63) / 64 * 64 + Keys::bytes(any);
  const Buffer slots(slot_bytes * threads), progress(s[sequences].floats * kv_heads * 4);
  if (!slots.p || !progress.p) return MEMLM_NO_MEMORY;

  struct Place { int64_t sequence, head, block; };
  // The last blocks first: with causal attention they take longest.
  const auto place = [&](int64_t i) {
    i = total - 1 - i;
    int64_t b = 0, last = sequences - 1;
    while (b < last) {
      const int64_t middle = (b + last) / 2;
      if (s[middle + 1].first * kv_heads <= i) b = middle + 1;
      else last = middle;
    }
    i -= s[b].first * kv_heads;
    return Place{b, i % kv_heads, i / kv_heads};
  };
  const auto cut_progress = [&](const Place& at, int64_t rows, int64_t part) {
    const int64_t floats = s[at.sequence].floats * kv_heads +
                           (at.head * s[at.sequence].parts + part) * Progress::floats(rows, width);
    return Progress::at(static_cast<float*>(progress.p) + floats, rows, width);
  };
  const auto finish = [&](const auto& passage, int64_t r0, int64_t count, const Progress& first,
                          int64_t parts, float* values) {
    for (int64_t i = 0; i < count; ++i) {
      const float lse = finish_row(first, i, parts, Progress::floats(count, width),
                                   passage.sink(r0 + i), values);
      passage.store(r0 + i, lse, values);
    }
  };

  parallel_for(total * most_parts, 1, threads, [&](int64_t begin, int64_t end, int slot) {
    char* const room = static_cast<char*>(slots.p) + slot * slot_bytes;
    float* const scores = reinterpret_cast<float*>(room);
    float* const values = scores + kTileM * kMostKeys;
    Row* const rows = reinterpret_cast<Row*>(scores + slot_floats);
    char* const rest = reinterpret_cast<char*>(rows) + (kBlockRows * sizeof(Row) + 63) / 64 * 64;
    for (int64_t i = begin; i < end; ++i) {
      const Place at = place(i / most_parts);
      const int64_t part = i % most_parts;
      if (part >= s[at.sequence].parts) continue;
      const auto passage = make(at.sequence, at.head);
      const bool cut = Span::is_cut(passage.rows());
      const int64_t most = passage.block_rows(), r0 = at.block * most, left = passage.rows() - r0;
      const int64_t count = left < most ? left : most;
      for (int64_t r = 0; r < count; ++r) rows[r] = passage.row(r0 + r);
      const Span span(passage.rows(), rows[0].lo, rows[count - 1].hi);
      const RowTiles tiles = RowTiles::even(count, kTileM);
      Keys keys(passage, rest);
      keys.queries(r0, tiles);
      const Progress here =
          cut ? cut_progress(at, count, part) : Progress::at(values + width, count, width);
      here.start(count);
      const ScoreRules rules = passage.rules();
      passage.runs(r0, span.begin(part), span.end(part), [&](int64_t lo, int64_t hi) {
        attend(keys, rules, rows, tiles, lo, hi, here, scores);
      });
      if (!cut) finish(passage, r0, count, here, 1, values);
    }
  });
  if (any_cut) {
    parallel_for(total, 1, threads, [&](int64_t begin, int64_t end, int slot) {
      float* const values = reinterpret_cast<float*>(static_cast<char*>(slots.p) + slot * slot_bytes);
      for (int64_t i = begin; i < end; ++i) {
        const Place at = place(i);
        const auto passage = make(at.sequence, at.head);
        const int64_t rows = passage.rows();
        if (Span::is_cut(rows))
          finish(passage, 0, rows, cut_progress(at, rows, 0), s[at.sequence].parts, values);
      }
    });
  }
  return MEMLM_OK;
}

}  // namespace MEMLM_ISA
}  // namespace memlm
