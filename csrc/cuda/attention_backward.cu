// Gradients of attention, with the probabilities computed again (FlashAttention-2, arXiv:2307.08691,
// algorithm 2): with P = exp(S - lse), delta = rowsum(dO * O) and S the scores,
//
//     dV = P^T dO      dP = dO V^T      dS = P * (dP - delta)      dQ = scale dS K      dK = scale dS^T Q
//
// Three kernels after another, so that each sum has one order: delta; dK and dV by thread blocks that take 64
// keys and go through the queries of all heads that share them; dQ by thread blocks that take 64 queries and
// go through the keys.  Both compute S and dP, or what is turned of them, with their own rows as A, so that P
// and dS lie in the lanes that the next product needs them in.
//
//   shared memory:  two operands of own rows [64][kDim] | stages: two of others [kOthers][kDim] | statistics
//
// Arithmetic: P and dS are rounded to T before they are multiplied; everything else is f32.  Where only the
// limits change scores, product times scale minus lse is rounded once.
#include "attention.h"

namespace memlm::cuda {
namespace {

using ll = long long;

// Rows of the other side at a time: few where the sums take half of the registers.
template <int kDim>
constexpr int kOthers = kDim == 256 ? 16 : 32;
template <int kDim>
constexpr int kStatistics = 3 * kOthers<kDim> * 4;  // bytes of a stage: lse, delta, hash of each query
enum Wanted { kGradK = 1, kGradV = 2 };

template <int kDim>
constexpr int stages_of(int arch) {
  return arch < 800 || kDim == 256 ? 1 : 2;
}
template <int kDim>
constexpr int shared_bytes(int arch) {
  return 2 * 2 * kDim * (kRowTile + stages_of<kDim>(arch) * kOthers<kDim>) +
         stages_of<kDim>(arch) * kStatistics<kDim>;
}

struct Backward {
  Attention a;
  Rows4 grad_out, grad_q, grad_k, grad_v;
  float* grad_mask;
  float* delta;  // [batch, heads, q_len]
  float scale;   // without log2(e)
};

MEMLM_DEVICE int64_t statistic_at(const Attention& a, const Place& place, int head, int i) {
  return (static_cast<int64_t>(place.batch) * a.heads + head) * a.q_len + place.q_first + i;
}

// What a query's probabilities are relative to; where it sees nothing they become 0.
MEMLM_DEVICE float base_of(float lse) { return lse == -INFINITY ? INFINITY : lse * kLog2E; }

// A warp takes a row.
template <class T>
__global__ void __launch_bounds__(kAttentionThreads) delta_kernel(const Backward p, int64_t rows) {
  const int64_t row = static_cast<int64_t>(block_x()) * (kAttentionThreads / kWarp) + warp();
  if (row >= rows) return;
  const int64_t head = row / p.a.q_len, i = row % p.a.q_len, b = head / p.a.heads;
  const T* const x = reinterpret_cast<const T*>(p.grad_out.row(b, head % p.a.heads, i));
  const T* const y = reinterpret_cast<const T*>(p.a.out.row(b, head % p.a.heads, i));
  float sum = 0;
  for (int d = lane(); d < p.a.v.dim; d += kWarp) sum = fma_f32(to_float(x[d]), to_float(y[d]), sum);
  for (int mask = kWarp / 2; mask; mask /= 2) sum += shuffle_xor(sum, mask);
  if (lane() == 0) p.delta[row] = sum;
}

// A thread block takes a head: each thread's rows in order, then those of lanes, then those of warps.
__global__ void __launch_bounds__(kAttentionThreads)
    sinks_kernel(const Backward p, int batch, float* grad_sinks) {
  const int head = block_x();
  const float sink = p.a.sinks[head] * kLog2E;
  float sum = 0;
  for (int b = 0; b < batch; b++) {
    const int64_t first = (static_cast<int64_t>(b) * p.a.heads + head) * p.a.q_len;
    for (int i = thread(); i < p.a.q_len; i += kAttentionThreads) {
      sum = fma_f32(-exp2_approx(sink - base_of(p.a.lse[first + i])), p.delta[first + i], sum);
    }
  }
  for (int mask = kWarp / 2; mask; mask /= 2) sum += shuffle_xor(sum, mask);
  float* const of_warps = shared<float>();
  if (lane() == 0) of_warps[warp()] = sum;
  MEMLM_SYNC_THREADS();
  if (thread()) return;
  sum = 0;
  for (int i = 0; i < kAttentionThreads / kWarp; i++) sum += of_warps[i];
  grad_sinks[head] = sum;
}

// p of a score relative to its row, and dp, become what is multiplied: P with dropout, without its factor,
// and dS.
template <class T>
MEMLM_DEVICE void soften(const Scores<T>& scores, int i, int j, bool visible, float base, float delta,
                         uint32_t hash, float& p, float& dp, float* grad_mask) {
  const Attention& a = scores.a;
  float factor = 1;
  const float s = visible ? scores.score(i, j, p, &factor) : -INFINITY;
  p = exp2_approx(s - base);
  float grad = dp;
  const bool dropped = a.dropped && scores.dropped(hash, j);
  if (a.dropped) grad = dropped ? 0 : grad * a.kept;
  // What is not seen may have any product.
  grad = s == -INFINITY ? 0 : p * (grad - delta);
  if (grad_mask && i < scores.place.q_len && j < scores.place.k_len) grad_mask[j] = grad;
  dp = grad * factor;
  if (dropped) p = 0;
}

// The same where scores are products times a scale, all seen.
MEMLM_DEVICE void soften(float scale, float base, float delta, float& p, float& dp) {
  p = exp2_approx(fma_f32(p, scale, -base));
  dp = p * (dp - delta);
}

// The rows of a warp's sums that exist, times a factor.
template <class T, int kDim>
MEMLM_DEVICE void store_rows(const Rows4& to, const Place& place, int head, int64_t first, int row0, int rows,
                             const float (&sums)[1][kDim / 8][4], float factor) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int row = row0 + lane() / 4 + 8 * r;
    if (row >= rows) continue;
    T* const x = reinterpret_cast<T*>(to.row(place.batch, head, first + row));
#pragma unroll
    for (int t = 0; t < kDim / 8; t++) {
      const int d = t * 8 + lane() % 4 * 2;
      if (d < to.dim) x[d] = from_float<T>(sums[0][t][2 * r] * factor);
      if (d + 1 < to.dim) x[d + 1] = from_float<T>(sums[0][t][2 * r + 1] * factor);
    }
  }
}

template <class T, int kDim>
__global__ void __launch_bounds__(kAttentionThreads, kDim == 256 ? 1 : 2)
    grad_q_kernel(const Backward p, int rows, bool plain) {
  constexpr int others = kOthers<kDim>, stages = stages_of<kDim>(kArch), tile_bytes = 2 * kDim * others;
  const Attention& a = p.a;
  const Place place(a, true, rows, a.heads);
  if (place.first >= place.q_len) return;
  const int kv_head = place.head / a.group;
  const Scores<T> scores(a, place, place.head);
  uint8_t* const queries = shared<uint8_t>();
  uint8_t* const grads = queries + kRowTile * kDim * 2;
  uint8_t* const ring = grads + kRowTile * kDim * 2;
  const int rows_here = rows < place.q_len - place.first ? rows : place.q_len - place.first;
  copy_rows<kRowTile>(Source<kDim>(a.q, place.batch, place.head, place.q_first), place.first, rows_here,
                      queries);
  copy_rows<kRowTile>(Source<kDim>(p.grad_out, place.batch, place.head, place.q_first), place.first,
                      rows_here, grads);
  const int position = place.first + scores.shift, last = position + rows_here - 1;
  int begin = position - a.left;
  const int end = last + a.right < place.k_len ? last + a.right + 1 : place.k_len;
  begin = begin > 0 ? begin / others * others : 0;
  const Source<kDim> k(a.k, place.batch, kv_head, place.k_first);
  const Source<kDim> v(a.v, place.batch, kv_head, place.k_first);
  const auto next_shown = [&](int j) {
    while (j < end && !scores.shown(place.first, j)) j += others;
    return j;
  };
  const auto copy = [&](int j, int stage) {
    if (j < end) {
      uint8_t* const to = ring + stage * 2 * tile_bytes;
      copy_rows<others>(k, j, end - j, to);
      copy_rows<others>(v, j, end - j, to + tile_bytes);
    }
    commit_copies();
  };
  const int row0 = warp() * 16, first = place.first + row0;
  float base[2], delta[2];
  uint32_t hashes[2] = {0, 0};
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int row = row0 + lane() / 4 + 8 * r;
    const int64_t at = statistic_at(a, place, place.head, place.first + row);
    base[r] = row < rows_here ? base_of(a.lse[at]) : INFINITY;
    delta[r] = row < rows_here ? p.delta[at] : 0;
    if (a.dropped) hashes[r] = dropout_row(a.seed, place.sequence, place.head, place.first + row);
  }
  float sums[1][kDim / 8][4] = {};
  int j = next_shown(begin), stage = 0;
  copy(j, 0);
  while (j < end) {
    const int next = next_shown(j + others);
    wait_copies<0>();
    MEMLM_SYNC_THREADS();  // and all are done with the other stage
    if (stages == 2) copy(next, stage ^ 1);
    if (row0 < rows_here && scores.any_seen(first, first + 15, j, j + others - 1)) {
      uint8_t* const tile = ring + stage * 2 * tile_bytes;
      float s[1][others / 8][4], ds[1][others / 8][4];
      multiply_rows<T, kDim>(queries, row0, tile, s);
      multiply_rows<T, kDim>(grads, row0, tile + tile_bytes, ds);
      if (plain && scores.all_seen(first, first + 15, j, j + others - 1)) {
#pragma unroll
        for (int t = 0; t < others / 8; t++) {
#pragma unroll
          for (int e = 0; e < 4; e++) soften(a.scale, base[e / 2], delta[e / 2], s[0][t][e], ds[0][t][e]);
        }
      } else {
#pragma unroll 1
        for (int t = 0; t < others / 8; t++) {
#pragma unroll
          for (int e = 0; e < 4; e++) {
            const int row = row0 + lane() / 4 + e / 2 * 8, i = place.first + row;
            float* const mask = p.grad_mask && row < rows_here
                                    ? p.grad_mask + statistic_at(a, place, place.head, i) * a.k_len
                                    : nullptr;
            soften(scores, i, j + t * 8 + lane() % 4 * 2 + e % 2, row < rows_here, base[e / 2], delta[e / 2],
                   hashes[e / 2], s[0][0][e], ds[0][0][e], mask);
          }
          turn(s[0]), turn(ds[0]);
        }
      }
      multiply_weights<T, kDim>(ds, tile, sums);
    }
    if (stages == 2) {
      stage ^= 1;
    } else {
      MEMLM_SYNC_THREADS();
      copy(next, 0);
    }
    j = next;
  }
  wait_copies<0>();
  store_rows<T, kDim>(p.grad_q, place, place.head, place.q_first + place.first, row0, rows_here, sums,
                      p.scale);
}

template <class T, int kDim, int wanted>
__global__ void __launch_bounds__(kAttentionThreads, kDim == 64 ? 2 : 1)
    grad_kv_kernel(const Backward p, int rows, bool plain) {
  constexpr int others = kOthers<kDim>, stages = stages_of<kDim>(kArch), tile_bytes = 2 * kDim * others;
  const Attention& a = p.a;
  const Place place(a, false, rows, a.heads / a.group);
  if (place.first >= place.k_len) return;
  uint8_t* const keys = shared<uint8_t>();
  uint8_t* const values = keys + kRowTile * kDim * 2;
  uint8_t* const ring = values + kRowTile * kDim * 2;
  uint8_t* const statistics = ring + stages * 2 * tile_bytes;
  const int rows_here = rows < place.k_len - place.first ? rows : place.k_len - place.first;
  copy_rows<kRowTile>(Source<kDim>(a.k, place.batch, place.head, place.k_first), place.first, rows_here,
                      keys);
  copy_rows<kRowTile>(Source<kDim>(a.v, place.batch, place.head, place.k_first), place.first, rows_here,
                      values);
  // The queries that see any of the block's keys: begin to end - 1.
  const int shift = place.shift(a);
  int begin = place.first - a.right - shift;
  const int64_t most = static_cast<int64_t>(place.first) + rows_here + a.left - shift;
  const int end = most < place.q_len ? static_cast<int>(most) : place.q_len;
  begin = begin > 0 ? begin / others * others : 0;

  const int row0 = warp() * 16, own = place.first + row0;
  float grad_k[1][wanted & kGradK ? kDim / 8 : 1][4] = {}, grad_v[1][wanted & kGradV ? kDim / 8 : 1][4] = {};
  for (int head = place.head * a.group; head < (place.head + 1) * a.group; head++) {
    const Scores<T> scores(a, place, head);
    const Source<kDim> q(a.q, place.batch, head, place.q_first);
    const Source<kDim> grad_out(p.grad_out, place.batch, head, place.q_first);
    const auto next_shown = [&](int i) {
      while (i < end && !scores.shown(i, place.first)) i += others;
      return i;
    };
    // A thread's: of the query that is its number further than the first that are copied.
    float lse = 0, delta = 0;
    uint32_t hash = 0;
    const auto copy = [&](int i, int stage) {
      if (i < end) {
        uint8_t* const to = ring + stage * 2 * tile_bytes;
        copy_rows<others>(q, i, end - i, to);
        copy_rows<others>(grad_out, i, end - i, to + tile_bytes);
        if (thread() < others) {
          const int64_t at = statistic_at(a, place, head, i + thread());
          const bool valid = i + thread() < end;
          lse = valid ? a.lse[at] : -INFINITY;
          delta = valid ? p.delta[at] : 0;
          hash = a.dropped ? dropout_row(a.seed, place.sequence, head, i + thread()) : 0;
        }
      }
      commit_copies();
    };
    // Behind products, in whose time the loads take place.
    const auto store_statistics = [&](int stage) {
      if (thread() >= others) return;
      float* const of = reinterpret_cast<float*>(statistics + stage * kStatistics<kDim>) + thread();
      of[0] = base_of(lse), of[others] = delta, of[2 * others] = as_float(hash);
    };
    int i = next_shown(begin), stage = 0;
    copy(i, 0);
    store_statistics(0);
    while (i < end) {
      const int next = next_shown(i + others);
      wait_copies<0>();
      MEMLM_SYNC_THREADS();  // and all are done with the other stage
      if (stages == 2) copy(next, stage ^ 1);
      if (row0 < rows_here && scores.any_seen(i, i + others - 1, own, own + 15)) {
        uint8_t* const tile = ring + stage * 2 * tile_bytes;
        const float* const of = reinterpret_cast<const float*>(statistics + stage * kStatistics<kDim>);
        float s[1][others / 8][4], ds[1][others / 8][4];
        multiply_rows<T, kDim>(keys, row0, tile, s);
        if (wanted & kGradK) multiply_rows<T, kDim>(values, row0, tile + tile_bytes, ds);
        if (plain && scores.all_seen(i, i + others - 1, own, own + 15)) {
#pragma unroll
          for (int t = 0; t < others / 8; t++) {
            const int at = t * 8 + lane() % 4 * 2;
            const Vec2 bases = load<Vec2>(of + at), deltas = load<Vec2>(of + others + at);
#pragma unroll
            for (int e = 0; e < 4; e++) {
              soften(a.scale, as_float(e % 2 ? bases.y : bases.x), as_float(e % 2 ? deltas.y : deltas.x),
                     s[0][t][e], ds[0][t][e]);
            }
          }
        } else {
#pragma unroll 1
          for (int t = 0; t < others / 8; t++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
              const int at = t * 8 + lane() % 4 * 2 + e % 2, row = row0 + lane() / 4 + e / 2 * 8;
              soften(scores, i + at, place.first + row, row < rows_here && i + at < end, of[at],
                     of[others + at], as_bits(of[2 * others + at]), s[0][0][e], ds[0][0][e],
                     static_cast<float*>(nullptr));
            }
            turn(s[0]), turn(ds[0]);
          }
        }
        if constexpr ((wanted & kGradV) != 0) multiply_weights<T, kDim>(s, tile + tile_bytes, grad_v);
        if constexpr ((wanted & kGradK) != 0) multiply_weights<T, kDim>(ds, tile, grad_k);
      }
      if (stages == 2) {
        stage ^= 1;
      } else {
        MEMLM_SYNC_THREADS();
        copy(next, 0);
      }
      store_statistics(stage);
      i = next;
    }
    MEMLM_SYNC_THREADS();  // All are done with the stages.
  }
  wait_copies<0>();
  const int64_t first = place.k_first + place.first;
  if constexpr ((wanted & kGradV) != 0)
    store_rows<T, kDim>(p.grad_v, place, place.head, first, row0, rows_here, grad_v, a.kept);
  if constexpr ((wanted & kGradK) != 0)
    store_rows<T, kDim>(p.grad_k, place, place.head, first, row0, rows_here, grad_k, p.scale);
}

template <class T, int kDim>
memlm_status launch_kernels(const Backward& p, const Gpu& gpu, void* stream) {
  const Attention& a = p.a;
  const int rows = a.block_mask && a.mask_block % kRowTile ? kMaskUnit : kRowTile,
            batch = a.q_offsets ? 1 : a.batch;
  const bool plain = a.plain() && !p.grad_mask;
  const int64_t q_blocks = Place::count(a, true, rows) * a.heads * batch;
  const int64_t k_blocks = Place::count(a, false, rows) * (a.heads / a.group) * batch;
  MEMLM_CHECK(q_blocks <= INT32_MAX && k_blocks <= INT32_MAX,
              "batch, heads, q_len, k_len: %lld and %lld tiles, accepted are up to 2^31 - 1",
              static_cast<ll>(q_blocks), static_cast<ll>(k_blocks));
  const int bytes = shared_bytes<kDim>(gpu.arch);
  if (bytes > gpu.shared_bytes) {
    return fail(
        MEMLM_UNSUPPORTED,
        "head_dim, v_dim: gradients of more than 128 need %d bytes of shared memory, the device has %d",
        bytes, gpu.shared_bytes);
  }
  if (k_blocks) {
    if constexpr (kDim == 256) {  // whose sums do not fit the registers together
      MEMLM_PASS(started(launch(&grad_kv_kernel<T, kDim, kGradK>, {k_blocks}, kAttentionThreads, bytes,
                                stream, p, rows, plain)));
      MEMLM_PASS(started(launch(&grad_kv_kernel<T, kDim, kGradV>, {k_blocks}, kAttentionThreads, bytes,
                                stream, p, rows, plain)));
    } else {
      MEMLM_PASS(started(launch(&grad_kv_kernel<T, kDim, kGradK | kGradV>, {k_blocks}, kAttentionThreads,
                                bytes, stream, p, rows, plain)));
    }
  }
  if (!q_blocks) return MEMLM_OK;
  return started(
      launch(&grad_q_kernel<T, kDim>, {q_blocks}, kAttentionThreads, bytes, stream, p, rows, plain));
}

template <class T>
memlm_status launch_backward(const Backward& p, float* grad_sinks, const Gpu& gpu, void* stream) {
  const int batch = p.a.q_offsets ? 1 : p.a.batch;
  const int64_t rows = static_cast<int64_t>(batch) * p.a.heads * p.a.q_len;
  const int64_t blocks = ceil_div(rows, kAttentionThreads / kWarp);
  MEMLM_CHECK(blocks <= INT32_MAX, "batch, heads, q_len: %lld rows, accepted are up to 2^33",
              static_cast<ll>(rows));
  if (rows) MEMLM_PASS(started(launch(&delta_kernel<T>, {blocks}, kAttentionThreads, 0, stream, p, rows)));
  if (grad_sinks) {
    MEMLM_PASS(started(launch(&sinks_kernel, {p.a.heads}, kAttentionThreads, kAttentionThreads / kWarp * 4,
                              stream, p, batch, grad_sinks)));
  }
  const int dim = p.a.q.dim > p.a.v.dim ? p.a.q.dim : p.a.v.dim;
  if (dim <= 64) return launch_kernels<T, 64>(p, gpu, stream);
  if (dim <= 128) return launch_kernels<T, 128>(p, gpu, stream);
  return launch_kernels<T, 256>(p, gpu, stream);
}

}  // namespace
}  // namespace memlm::cuda

using namespace memlm;
using namespace memlm::cuda;

memlm_status memlm_cuda_attention_backward(const memlm_attention_args* args,
                                           const memlm_attention_grads* grads, memlm_cuda_queue* queue) {
  Gpu gpu;
  Backward p = {};
  MEMLM_PASS(prepare_attention(args, &gpu, &p.a));
  MEMLM_CHECK(grads, "grads: NULL");
  const memlm_attention_grads& g = *grads;
  MEMLM_PASS(check_arrays(args->dtype, "grad_out, grad_q, grad_k, grad_v",
                          {g.grad_out, g.grad_q, g.grad_k, g.grad_v}));
  MEMLM_CHECK(!args->batch || !args->q_len || (g.grad_out && g.grad_q), "grad_out, grad_q: NULL");
  MEMLM_CHECK(!args->batch || !args->k_len || (g.grad_k && g.grad_v), "grad_k, grad_v: NULL");
  MEMLM_CHECK(!g.grad_mask || !args->q_offsets, "grad_mask: is not for sequences with offsets");
  MEMLM_CHECK(!g.grad_sinks || args->sinks, "grad_sinks: there are no sinks");
  const int64_t rows = (args->q_offsets ? 1 : args->batch) * args->heads * args->q_len;
  MEMLM_PASS(need(queue, rows * 4));
  p.grad_out = rows4(g.grad_out, g.grad_out_strides, args->v_dim),
  p.grad_v = rows4(g.grad_v, g.grad_v_strides, args->v_dim);
  p.grad_q = rows4(g.grad_q, g.grad_q_strides, args->head_dim),
  p.grad_k = rows4(g.grad_k, g.grad_k_strides, args->head_dim);
  p.grad_mask = g.grad_mask, p.delta = static_cast<float*>(queue->workspace), p.scale = args->scale;
  if (g.grad_mask) MEMLM_PASS(started(clear(g.grad_mask, rows * args->k_len * 4, queue->stream)));
  return args->dtype == MEMLM_F16 ? launch_backward<f16>(p, g.grad_sinks, gpu, queue->stream)
                                  : launch_backward<bf16>(p, g.grad_sinks, gpu, queue->stream);
}
