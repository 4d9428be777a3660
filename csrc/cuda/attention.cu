// softmax(scale q k^T + bias) v in one pass over the keys (FlashAttention-2, arXiv:2307.08691).
//
// A thread block takes 128 queries of a head, or 64 of heads above 128, a warp a fourth of them.  Keys and
// values come to shared memory kKeys at a time: values while the keys are multiplied, the next keys while
// the values are.  The scores of a warp are sums of m16n8k16 and stay in registers: as probabilities, rounded
// to 16 bits, they are the A operand of the product with the values, in the very lanes that hold them.  With
// 32 queries a warp, each matrix of keys or values that is loaded serves two products; more do not fit the
// registers.
//
//   shared memory:  queries [128 or 64][kDim] | keys [kKeys][kDim] | values
//
// Arithmetic: products of 16-bit numbers and their sums f32; scores in f32, in units of log2; weights
// relative to a base, which is a score of the row and at most 8 below the largest so far: weights are up to
// 2^8, which T holds, and sums are seldom multiplied again.  Where only the limits change scores, product
// times scale minus base is rounded once.  Weights are rounded to T, their sum is taken of those unrounded;
// results are rounded once.
#include "attention.h"

namespace memlm::cuda {
namespace {

using ll = long long;

constexpr int kWarps = kAttentionThreads / kWarp;
constexpr float kSlack = 8;  // of the base
constexpr float kLeast = -3.402823466e38f;
template <int kDim>
constexpr int kHeight = kDim == 256 ? 1 : 2;  // of a warp's queries, in rows of matrices
template <int kDim>
constexpr int kQueries = kWarps * 16 * kHeight<kDim>;
template <int kDim, int kKeys>
constexpr int kSharedBytes = 2 * kDim * (kQueries<kDim> + 2 * kKeys);

template <class T, int kDim, int kKeys, bool kPlain>
__global__ void __launch_bounds__(kAttentionThreads, 2) attention_kernel(const Attention a) {
  constexpr int height = kHeight<kDim>, warp_rows = 16 * height, block_rows = kQueries<kDim>;
  const Place place(a, true, block_rows, a.heads);
  if (place.first >= place.q_len) return;
  const int kv_head = place.head / a.group;
  uint8_t* const queries = shared<uint8_t>();
  uint8_t* const key_tile = queries + block_rows * kDim * 2;
  uint8_t* const value_tile = key_tile + kKeys * kDim * 2;
  const Scores<T> scores(a, place, place.head);

  const int rows_here = block_rows < place.q_len - place.first ? block_rows : place.q_len - place.first;
  copy_rows<block_rows>(Source<kDim>(a.q, place.batch, place.head, place.q_first), place.first, rows_here,
                        queries);
  // What the block's queries see: keys begin to end - 1.
  const int position = place.first + scores.shift, last = position + rows_here - 1;
  int begin = position - a.left, end = last + a.right < place.k_len ? last + a.right + 1 : place.k_len;
  begin = begin > 0 ? begin / kKeys * kKeys : 0;

  const Source<kDim> k(a.k, place.batch, kv_head, place.k_first);
  const Source<kDim> v(a.v, place.batch, kv_head, place.k_first);
  // The first keys from j on that the block mask shows to any of the queries.
  const auto next_shown = [&](int j) {
    const auto shown = [&] {
      for (int i = place.first; i < place.first + block_rows && i < place.q_len; i += kMaskUnit) {
        if (scores.shown(i, j)) return true;
      }
      return false;
    };
    while (j < end && !shown()) j += kKeys;
    return j;
  };
  const auto copy = [&](const Source<kDim>& source, int j, uint8_t* tile) {
    if (j < end) copy_rows<kKeys>(source, j, end - j, tile);
    commit_copies();
  };

  // A lane's queries: those 8 apart from i0 on.
  const int row0 = warp() * warp_rows, first = place.first + row0, i0 = first + lane() / 4;
  float sums[height][kDim / 8][4] = {};
  float base[2 * height], total[2 * height];
#pragma unroll
  for (int r = 0; r < 2 * height; r++) base[r] = kLeast, total[r] = 0;

  int j = next_shown(begin);
  copy(k, j, key_tile);
  while (j < end) {
    const int next = next_shown(j + kKeys);
    const bool seen =
        scores.any_seen(first, first + warp_rows - 1, j, j + kKeys - 1) && scores.shown(first, j);
    float p[height][kKeys / 8][4];
    wait_copies<0>();
    MEMLM_SYNC_THREADS();  // keys are there, and all are done with the values before
    copy(v, j, value_tile);
    // Also where none is seen, which is seldom: p in two states costs registers.
    multiply_rows<T, kDim>(queries, row0, key_tile, p);
    wait_copies<0>();
    MEMLM_SYNC_THREADS();  // values are there, and all are done with the keys
    copy(k, next, key_tile);
    if (seen) {
      // What p becomes the scores with.
      const float scale = kPlain ? a.scale : 1;
      const auto each = [&](const auto& change) {
#pragma unroll
        for (int h = 0; h < height; h++) {
#pragma unroll
          for (int t = 0; t < kKeys / 8; t++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
              const int r = 2 * h + e / 2;
              change(p[h][t][e], r, i0 + 8 * r, j + t * 8 + lane() % 4 * 2 + e % 2);
            }
          }
        }
      };
      if constexpr (!kPlain) {
        // One row of matrices after the other in the same registers, whose code is there once.
#pragma unroll 1
        for (int h = 0; h < height; h++) {
#pragma unroll
          for (int t = 0; t < kKeys / 8; t++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
              const int i = i0 + 16 * h + e / 2 * 8, key = j + t * 8 + lane() % 4 * 2 + e % 2;
              float factor;
              const float score = scores.score(i, key, p[0][t][e], &factor);
              p[0][t][e] = p[height - 1][t][e];
              p[height - 1][t][e] = score;
            }
          }
        }
      } else if (!scores.all_seen(first, first + warp_rows - 1, j, j + kKeys - 1)) {
        each([&](float& x, int, int i, int key) { x = scores.seen(i, key) ? x : -INFINITY; });
      }
      // NaN is not the largest, but stays in the weights.
      float most[2 * height];
#pragma unroll
      for (int r = 0; r < 2 * height; r++) most[r] = -INFINITY;
      each([&](float& x, int r, int, int) { most[r] = larger(most[r], x); });
      bool above = false;
#pragma unroll
      for (int r = 0; r < 2 * height; r++) above |= most[r] * scale > base[r] + kSlack;
      if (ballot(above)) {
#pragma unroll
        for (int r = 0; r < 2 * height; r++) {
          for (int mask = 1; mask < 4; mask *= 2) most[r] = larger(most[r], shuffle_xor(most[r], mask));
          const float now = most[r] * scale, kept = base[r];
          if (now > kept + kSlack) base[r] = now;
          const float factor = exp2_approx(kept - base[r]);
          total[r] *= factor;
#pragma unroll
          for (int t = 0; t < kDim / 8; t++) {
            sums[r / 2][t][r % 2 * 2] *= factor, sums[r / 2][t][r % 2 * 2 + 1] *= factor;
          }
        }
      }
      const auto weigh = [&](float& x, int r, int, int) {
        x = exp2_approx(fma_f32(x, scale, -base[r]));
        total[r] += x;
      };
      if (kPlain || !a.dropped) {
        each(weigh);
      } else {
        uint32_t hashes[2 * height];
#pragma unroll
        for (int r = 0; r < 2 * height; r++)
          hashes[r] = dropout_row(a.seed, place.sequence, place.head, i0 + 8 * r);
        each([&](float& x, int r, int i, int key) {
          weigh(x, r, i, key);
          if (scores.dropped(hashes[r], key)) x = 0;
        });
      }
      multiply_weights<T, kDim>(p, value_tile, sums);
    }
    j = next;
  }

#pragma unroll
  for (int r = 0; r < 2 * height; r++) {
    for (int mask = 1; mask < 4; mask *= 2) total[r] += shuffle_xor(total[r], mask);
    float factor = 1;
    if (a.sinks) {
      const float sink = a.sinks[place.head] * kLog2E, now = larger(sink, base[r]);
      factor = exp2_approx(base[r] - now);
      total[r] = total[r] * factor + exp2_approx(sink - now);
      base[r] = now;
    }
    const int i = i0 + 8 * r;
    if (i >= place.q_len) continue;
    const bool empty = total[r] == 0;
    factor = empty ? 0 : factor / total[r] * a.kept;
    if (lane() % 4 == 0) {
      const int64_t at =
          (static_cast<int64_t>(place.batch) * a.heads + place.head) * a.q_len + place.q_first + i;
      a.lse[at] = empty ? -INFINITY : (base[r] + log2_approx(total[r])) * kLn2;
    }
    T* const out = reinterpret_cast<T*>(a.out.row(place.batch, place.head, place.q_first + i));
#pragma unroll
    for (int t = 0; t < kDim / 8; t++) {
      const int d = t * 8 + lane() % 4 * 2;
      const float x0 = sums[r / 2][t][r % 2 * 2] * factor, x1 = sums[r / 2][t][r % 2 * 2 + 1] * factor;
      if (a.out.wide) {
        if (d < a.out.dim) store(out + d, pair<T>(x0, x1));
      } else {
        if (d < a.out.dim) out[d] = from_float<T>(x0);
        if (d + 1 < a.out.dim) out[d + 1] = from_float<T>(x1);
      }
    }
  }
  wait_copies<0>();
}

template <class T, int kDim, int kKeys, bool kPlain>
memlm_status launch_kernel(const Attention& a, void* stream) {
  const int64_t blocks = Place::count(a, true, kQueries<kDim>) * a.heads * (a.q_offsets ? 1 : a.batch);
  MEMLM_CHECK(blocks <= INT32_MAX, "batch, heads, q_len: %lld tiles, accepted are up to 2^31 - 1",
              static_cast<ll>(blocks));
  return started(launch(&attention_kernel<T, kDim, kKeys, kPlain>, {blocks}, kAttentionThreads,
                        kSharedBytes<kDim, kKeys>, stream, a));
}

template <class T, int kDim>
memlm_status launch_attention(const Attention& a, const Gpu& gpu, void* stream) {
  // The scores of more keys do not fit the registers beside what options need.
  if (!a.plain()) return launch_kernel<T, kDim, 32, false>(a, stream);
  if constexpr (kDim < 256) {
    // Two blocks are to fit a multiprocessor, and the keys of a tile are seen or hidden together.
    if (gpu.shared_bytes >= 2 * kSharedBytes<kDim, 64> && (!a.block_mask || a.mask_block % 64 == 0))
      return launch_kernel<T, kDim, 64, true>(a, stream);
  }
  return launch_kernel<T, kDim, 32, true>(a, stream);
}

template <class T>
memlm_status launch_attention(const Attention& a, const Gpu& gpu, void* stream) {
  const int dim = a.q.dim > a.v.dim ? a.q.dim : a.v.dim;
  if (dim <= 64) return launch_attention<T, 64>(a, gpu, stream);
  if (dim <= 128) return launch_attention<T, 128>(a, gpu, stream);
  return launch_attention<T, 256>(a, gpu, stream);
}

}  // namespace

Rows4 rows4(const void* p, const int64_t* strides, int64_t dim) {
  const auto fits = [](int64_t elements) { return elements % 8 == 0; };
  return {static_cast<uint16_t*>(const_cast<void*>(p)),
          {strides[0], strides[1], strides[2]},
          static_cast<int>(dim),
          is_aligned(p, 16) && fits(strides[0]) && fits(strides[1]) && fits(strides[2]) && fits(dim)};
}

memlm_status prepare_attention(const memlm_attention_args* args, Gpu* gpu, Attention* attention) {
  MEMLM_CHECK(args, "args: NULL");
  const memlm_attention_args& a = *args;
  MEMLM_PASS(check_arrays(a.dtype, "q, k, v, out", {a.q, a.k, a.v, a.out}));
  MEMLM_PASS(find_gpu(a.dtype, gpu));
  const struct {
    const char* name;
    int64_t value, least, most;
  } sizes[] = {{"batch", a.batch, 0, INT32_MAX},      {"heads", a.heads, 1, INT32_MAX},
               {"kv_heads", a.kv_heads, 1, INT32_MAX}, {"q_len", a.q_len, 0, kFar - 1},
               {"k_len", a.k_len, 0, kFar - 1},        {"head_dim", a.head_dim, 1, kMostDim},
               {"v_dim", a.v_dim, 1, kMostDim}};
  for (const auto& size : sizes) {
    MEMLM_CHECK(size.value >= size.least && size.value <= size.most,
                "%s: got %lld, accepted are %lld to %lld", size.name, static_cast<ll>(size.value),
                static_cast<ll>(size.least), static_cast<ll>(size.most));
  }
  MEMLM_CHECK(a.heads % a.kv_heads == 0, "heads: %lld are no multiple of %lld kv_heads",
              static_cast<ll>(a.heads), static_cast<ll>(a.kv_heads));
  MEMLM_CHECK(!a.batch || !a.q_len || (a.q && a.out && a.lse), "q, out, lse: NULL");
  MEMLM_CHECK(!a.batch || !a.k_len || (a.k && a.v), "k, v: NULL");
  MEMLM_CHECK(!a.q_offsets == !a.k_offsets, "q_offsets, k_offsets: one is NULL, the other is not");
  MEMLM_CHECK(!a.q_offsets || (!a.mask && !a.block_mask),
              "mask, block_mask: are not for sequences with offsets");
  MEMLM_CHECK(
      !a.block_mask || (a.mask_block >= kMaskUnit && a.mask_block <= kFar && a.mask_block % kMaskUnit == 0),
      "mask_block: got %lld, accepted are multiples of 32 up to 2^30", static_cast<ll>(a.mask_block));
  MEMLM_CHECK(a.scale - a.scale == 0, "scale: got %g, accepted is a finite one", a.scale);
  MEMLM_CHECK(a.softcap >= 0 && a.softcap - a.softcap == 0, "softcap: got %g, accepted is 0 or above",
              a.softcap);
  MEMLM_CHECK(a.dropout >= 0 && a.dropout < 1, "dropout: got %g, accepted is 0 to below 1", a.dropout);

  const auto limit = [](int64_t keys) { return static_cast<int>(keys < 0 || keys > kFar ? kFar : keys); };
  Attention& to = *attention;
  to = {};
  to.q = rows4(a.q, a.q_strides, a.head_dim), to.k = rows4(a.k, a.k_strides, a.head_dim);
  to.v = rows4(a.v, a.v_strides, a.v_dim), to.out = rows4(a.out, a.out_strides, a.v_dim);
  to.lse = a.lse, to.q_offsets = a.q_offsets, to.k_offsets = a.k_offsets;
  to.batch = static_cast<int>(a.batch), to.heads = static_cast<int>(a.heads);
  to.group = static_cast<int>(a.heads / a.kv_heads);
  to.q_len = static_cast<int>(a.q_len), to.k_len = static_cast<int>(a.k_len);
  to.left = limit(a.left), to.right = limit(a.right) - (limit(a.right) == kFar), to.to_end = a.to_end;
  to.scale = a.scale * kLog2E;
  to.mask = a.mask, to.mask_is_bool = a.mask_is_bool;
  to.block_mask = a.block_mask, to.mask_block = static_cast<int>(a.mask_block);
  for (int i = 0; i < 4; i++)
    to.mask_strides[i] = a.mask_strides[i], to.block_mask_strides[i] = a.block_mask_strides[i];
  to.softcap = a.softcap, to.slopes = a.slopes, to.sinks = a.sinks;
  to.dropped = dropout_threshold(a.dropout), to.kept = 1 / (1 - a.dropout), to.seed = a.seed;
  return MEMLM_OK;
}

}  // namespace memlm::cuda

using namespace memlm;
using namespace memlm::cuda;

memlm_status memlm_cuda_attention(const memlm_attention_args* args, memlm_cuda_queue* queue) {
  Gpu gpu;
  Attention a;
  MEMLM_PASS(prepare_attention(args, &gpu, &a));
  if (!args->batch || !args->q_len) return MEMLM_OK;
  return args->dtype == MEMLM_F16 ? launch_attention<f16>(a, gpu, queue->stream)
                                  : launch_attention<bf16>(a, gpu, queue->stream);
}
