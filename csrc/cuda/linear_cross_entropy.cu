// The cross entropy of a linear layer whose logits are never stored (arXiv:2411.09009):
// lse[i] = log sum_j exp z[i, j], z = hidden weight^T + bias, and the loss by it and the target's z.
//
// A thread block takes 128 tokens and a share of the vocabulary, 128 words at a time; k comes to shared
// memory 32 at a time, three stages on the way.  Warps are 4 x 2, each with 32 tokens and 64 words:
//
//             words 0-63   64-127          A stage is 128 rows of hidden, then 128 of weight, 64 bytes
//   tokens    warp 0       warp 4          each.  Two rows are a line of 128 bytes, whose pieces of 16
//    0-31                                  bytes are turned about by the line's number, so that 8 rows
//   32-63     1            5               of one piece meet all banks:
//   64-95     2            6
//   96-127    3            7                  line  piece 0 1 2 3 of row 2 line | of row 2 line + 1
//                                             0           0 1 2 3               | 0 1 2 3
//                                             1           1 0 3 2               | 1 0 3 2   ...
//
// A lane has 4 tokens (g, g + 8, g + 16, g + 24 of its warp's) and 16 of their words, and keeps for each of
// its tokens a maximum of its own, the sum of exponentials relative to it, the sum of logits, and the
// target's logit.  These are put together at the end only: among the four lanes of a token by shuffles, among
// warps and thread blocks by a second kernel, in their order.
//
// Backward computes the logits of some words again and stores what their gradients are,
// grad (exp(z - lse) - (1 - smoothing) [j = target] - smoothing / v), rounded to 16 bits; two ordinary
// products make of these the gradients of hidden and weight (csrc/torch/training.h).
//
// Arithmetic: products of 16-bit numbers and their sums f32, then + bias; exponentials and their sums f32, in
// units of log2.  -Inf is a word that is not there.
#include "host.h"

namespace memlm::cuda {
namespace {

using ll = long long;

constexpr int kThreads = 256;
constexpr int kTokens = 128, kWords = 128;          // of a block's tile
constexpr int kWarpTokens = 32, kWarpWords = 64;
constexpr int kTokenWarps = kTokens / kWarpTokens, kWordWarps = kWords / kWarpWords;
static_assert(kTokenWarps * kWordWarps * kWarp == kThreads);
constexpr int kStageK = 32, kPieces = kStageK / 8, kRowBytes = 2 * kStageK;
constexpr int kStageBytes = (kTokens + kWords) * kRowBytes;
constexpr int stages_of(int arch) { return arch < 800 ? 1 : 3; }
constexpr int kMine = 4;  // tokens of a lane
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

// Of a token and a part of the vocabulary.  Logits in units of log2 but for `logit`; most -Inf: nothing.
struct alignas(16) Part {
  float most, total, sum, logit;
};

struct Matrix {
  const uint16_t* p;
  int64_t stride;
  int rows;
  bool wide;  // rows consist of aligned pieces of 16 bytes
};

struct Logits {
  Matrix hidden, weight;
  const void* bias;
  int k, tiles, tiles_here;  // tiles of words; those of a block
  const int64_t* targets;
};

MEMLM_DEVICE uint8_t* piece_at(uint8_t* rows, int row, int piece) {
  return rows + row * kRowBytes + (piece ^ row / 2 % kPieces) * 16;
}

// Begins to copy k0 .. k0 + 31 of 128 rows from `first` on; what is not there becomes 0.
MEMLM_DEVICE void copy_rows(const Matrix& from, int64_t first, int k0, int k, uint8_t* to) {
#pragma unroll
  for (int i = thread(); i < kTokens * kPieces; i += kThreads) {
    const int row = i / kPieces, piece = i % kPieces, at = k0 + piece * 8;
    const bool valid = first + row < from.rows && at < k;
    const uint16_t* const x = valid ? from.p + (first + row) * from.stride + at : from.p;
    if (from.wide) {
      copy_async(piece_at(to, row, piece), x, valid);
    } else {
      uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
      for (int e = 0; e < 8; e++) {
        if (valid && at + e < k) words[e / 2] |= static_cast<uint32_t>(x[e]) << e % 2 * 16;
      }
      store(piece_at(to, row, piece), Vec4{words[0], words[1], words[2], words[3]});
    }
  }
}
static_assert(kTokens == kWords);

// z [32 tokens][64 words] += a stage's products.
template <class T>
MEMLM_DEVICE void multiply_stage(uint8_t* hidden, uint8_t* weight, int token0, int word0,
                                 float (&z)[2][8][4]) {
  const int r = lane() % 8, upper = lane() / 8 % 2, last = lane() / 16;
#pragma unroll(kArch < 800 ? 1 : kStageK / 16)  // 7.5 has no registers for both
  for (int d = 0; d < kStageK / 16; d++) {
    uint32_t x[2][4];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      load_matrices(x[i], piece_at(hidden, token0 + 16 * i + r + 8 * upper, 2 * d + last));
    }
#pragma unroll
    for (int t = 0; t < 8; t += 2) {
      uint32_t y[4];
      load_matrices(y, piece_at(weight, word0 + 8 * (t + last) + r, 2 * d + upper));
      const uint32_t y0[2] = {y[0], y[1]}, y1[2] = {y[2], y[3]};
#pragma unroll
      for (int i = 0; i < 2; i++) {
        mma<T>(z[i][t], x[i], y0);
        mma<T>(z[i][t + 1], x[i], y1);
      }
    }
  }
}

MEMLM_DEVICE Part read_part(const Part* from) {
  const Vec4 v = load<Vec4>(from);
  return {as_float(v.x), as_float(v.y), as_float(v.z), as_float(v.w)};
}
MEMLM_DEVICE void write_part(Part* to, const Part& part) {
  store(to, Vec4{as_bits(part.most), as_bits(part.total), as_bits(part.sum), as_bits(part.logit)});
}

MEMLM_DEVICE void join(Part& a, const Part& b) {
  const float most = a.most > b.most ? a.most : b.most, base = most == -INFINITY ? 0 : most;
  a.total = a.total * exp2_approx(a.most - base) + b.total * exp2_approx(b.most - base);
  a.most = most;
  a.sum += b.sum;
  a.logit += b.logit;
}

// Calls with_tile(first word of the warp, z) for each of the block's tiles of words, of all k.
template <class T, class WithTile>
MEMLM_DEVICE void for_tiles(const Logits& p, int token0, int word0, const WithTile& with_tile) {
  constexpr int stages = stages_of(kArch);
  uint8_t* const ring = shared<uint8_t>();
  const int64_t block_token = static_cast<int64_t>(block_x()) * kTokens;
  const int first_tile = block_y() * p.tiles_here;
  const int end = p.tiles - first_tile < p.tiles_here ? p.tiles : first_tile + p.tiles_here;

  int next_tile = first_tile, next_k = 0;  // of the stage that is copied next
  const auto copy = [&](int stage) {
    if (next_tile < end) {
      uint8_t* const to = ring + stage * kStageBytes;
      copy_rows(p.hidden, block_token, next_k, p.k, to);
      copy_rows(p.weight, static_cast<int64_t>(next_tile) * kWords, next_k, p.k, to + kTokens * kRowBytes);
      next_k += kStageK;
      if (next_k >= p.k) next_k = 0, next_tile++;
    }
    commit_copies();
  };
  for (int s = 0; s < stages - 1; s++) copy(s);

  float z[2][8][4] = {};
  int tile = first_tile, k = 0, stage = 0;
  while (tile < end) {
    if (stages == 1) copy(0);
    wait_copies<stages == 1 ? 0 : stages - 2>();
    MEMLM_SYNC_THREADS();
    if (stages > 1) copy((stage + stages - 1) % stages);
    uint8_t* const here = ring + stage * kStageBytes;
    multiply_stage<T>(here, here + kTokens * kRowBytes, token0, word0, z);
    if (stages == 1) MEMLM_SYNC_THREADS();
    stage = (stage + 1) % stages;
    k += kStageK;
    if (k < p.k) continue;
    with_tile(tile * kWords + word0, z);
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
      for (int t = 0; t < 8; t++) {
#pragma unroll
        for (int e = 0; e < 4; e++) z[i][t][e] = 0;
      }
    }
    k = 0;
    tile++;
  }
}

// The lane's first token.
MEMLM_DEVICE int token_of(int token0) { return block_x() * kTokens + token0 + lane() / 4; }

template <class T>
__global__ void __launch_bounds__(kThreads, 2) logits_kernel(const Logits p, Part* parts) {
  const int token0 = warp() % kTokenWarps * kWarpTokens, word0 = warp() / kTokenWarps * kWarpWords;
  const int first_token = token_of(token0);
  Part mine[kMine];
  for (Part& part : mine) part = {-INFINITY, 0, 0, 0};

  for_tiles<T>(p, token0, word0, [&](int first_word, float (&z)[2][8][4]) {
    float most[kMine];
    int target[kMine];  // read for each tile: there is no register to keep it in
#pragma unroll
    for (int i = 0; i < kMine; i++) {
      most[i] = mine[i].most;
      const int64_t wanted = first_token + 8 * i < p.hidden.rows ? p.targets[first_token + 8 * i] : -1;
      target[i] = wanted >= 0 && wanted < p.weight.rows ? static_cast<int>(wanted) : -1;
    }
#pragma unroll
    for (int t = 0; t < 8; t++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int word = first_word + lane() % 4 * 2 + 8 * t + e;
        const bool exists = word < p.weight.rows;
        const float bias = p.bias && exists ? to_float(static_cast<const T*>(p.bias)[word]) : 0;
#pragma unroll
        for (int i = 0; i < kMine; i++) {
          float& logit = z[i / 2][t][i % 2 * 2 + e];
          logit += bias;
          if (exists) mine[i].sum += logit;
          if (word == target[i]) mine[i].logit = logit;
          logit = exists ? logit * kLog2E : -INFINITY;
          most[i] = logit > most[i] ? logit : most[i];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kMine; i++) {
      // NaN is not the largest, but stays in the sum.
      const float base = most[i] == -INFINITY ? 0 : most[i];
      float total = mine[i].total * exp2_approx(mine[i].most - base);
#pragma unroll
      for (int t = 0; t < 8; t++) {
#pragma unroll
        for (int e = 0; e < 2; e++) total += exp2_approx(z[i / 2][t][i % 2 * 2 + e] - base);
      }
      mine[i].total = total;
      mine[i].most = most[i];
    }
  });

  const int64_t part = static_cast<int64_t>(block_y()) * kWordWarps + warp() / kTokenWarps;
#pragma unroll
  for (int i = 0; i < kMine; i++) {
    for (int mask = 1; mask < 4; mask *= 2) {
      join(mine[i], {shuffle_xor(mine[i].most, mask), shuffle_xor(mine[i].total, mask),
                     shuffle_xor(mine[i].sum, mask), shuffle_xor(mine[i].logit, mask)});
    }
    const int token = first_token + 8 * i;
    if (lane() % 4 == 0 && token < p.hidden.rows) write_part(parts + part * p.hidden.rows + token, mine[i]);
  }
}

// What becomes the gradients of logits.
struct Gradient {
  const float *lse, *grad;
  int64_t ignore_index;
  float smoothing, share;  // of the target's weight; of that for each word
  int first;               // word of the vocabulary that is the matrix's first
  void* out;
  int64_t stride;
  bool pairs;  // whether two may be stored at once
};

template <class T>
__global__ void __launch_bounds__(kThreads, 2) gradient_kernel(const Logits p, const Gradient q) {
  const int token0 = warp() % kTokenWarps * kWarpTokens, word0 = warp() / kTokenWarps * kWarpWords;
  const int first_token = token_of(token0);
  for_tiles<T>(p, token0, word0, [&](int first_word, float (&z)[2][8][4]) {
#pragma unroll
    for (int i = 0; i < kMine; i++) {
      const int token = first_token + 8 * i;
      if (token >= p.hidden.rows) continue;
      const int64_t wanted = p.targets[token], target = wanted - q.first;
      const float grad = wanted == q.ignore_index ? 0 : q.grad[token], lse = q.lse[token] * kLog2E;
      T* const out = static_cast<T*>(q.out) + token * q.stride;
#pragma unroll
      for (int t = 0; t < 8; t++) {
        const int word = first_word + lane() % 4 * 2 + 8 * t;
        float d[2];
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const bool exists = word + e < p.weight.rows;
          const float bias = p.bias && exists ? to_float(static_cast<const T*>(p.bias)[word + e]) : 0;
          const float one = (word + e == target ? 1 - q.smoothing : 0) + q.share;
          d[e] = (exp2_approx((z[i / 2][t][i % 2 * 2 + e] + bias) * kLog2E - lse) - one) * grad;
        }
        if (q.pairs && word + 1 < p.weight.rows) {
          store(out + word, pair<T>(d[0], d[1]));
        } else {
          for (int e = 0; e < 2 && word + e < p.weight.rows; e++) out[word + e] = from_float<T>(d[e]);
        }
      }
    }
  });
}

struct Combine {
  const Part* parts;
  int64_t m, v, ignore_index;
  int count;
  float smoothing;
  const int64_t* targets;
  float *losses, *lse;
};

__global__ void __launch_bounds__(kThreads) combine_kernel(const Combine p) {
  const int64_t token = static_cast<int64_t>(block_x()) * kThreads + thread();
  if (token >= p.m) return;
  Part all = {-INFINITY, 0, 0, 0};
  for (int part = 0; part < p.count; part++) join(all, read_part(p.parts + part * p.m + token));
  const float lse = (all.most + log2_approx(all.total)) * kLn2;
  const int64_t target = p.targets[token];
  float loss = lse - (1 - p.smoothing) * all.logit;
  if (p.smoothing != 0) loss -= p.smoothing * (all.sum / static_cast<float>(p.v));
  if (target < 0 || target >= p.v) loss = as_float(0x7fc00000);
  p.losses[token] = target == p.ignore_index ? 0 : loss;
  p.lse[token] = lse;
}

Matrix matrix(const void* x, int64_t stride, int64_t rows, int64_t k) {
  const bool wide = k % 8 == 0 && stride % 8 == 0 && is_aligned(x, 16);
  return {static_cast<const uint16_t*>(x), stride, static_cast<int>(rows), wide};
}

memlm_status check(const memlm_cuda_linear_cross_entropy_args* args, Gpu* gpu) {
  MEMLM_CHECK(args, "args: NULL");
  const memlm_cuda_linear_cross_entropy_args& a = *args;
  constexpr int64_t most = INT32_MAX - kWords;
  MEMLM_CHECK(a.m >= 0 && a.m <= most && a.v >= 1 && a.v <= most && a.k >= 1 && a.k <= most,
              "m, v, k: got %lld, %lld, %lld, accepted are 0, 1 and 1 to %lld", static_cast<ll>(a.m),
              static_cast<ll>(a.v), static_cast<ll>(a.k), static_cast<ll>(most));
  MEMLM_CHECK(!a.m || (a.hidden && a.weight && a.targets), "hidden, weight, targets: NULL");
  MEMLM_CHECK(a.hidden_stride >= a.k && a.weight_stride >= a.k,
              "hidden_stride, weight_stride: got %lld, %lld, at least k = %lld is needed",
              static_cast<ll>(a.hidden_stride), static_cast<ll>(a.weight_stride), static_cast<ll>(a.k));
  MEMLM_CHECK(a.label_smoothing >= 0 && a.label_smoothing <= 1, "label_smoothing: got %g, accepted is 0 to 1",
              static_cast<double>(a.label_smoothing));
  MEMLM_CHECK(is_aligned(a.targets, 8), "targets: not aligned to an element");
  MEMLM_PASS(check_arrays(a.dtype, "hidden, weight, bias", {a.hidden, a.weight, a.bias}));
  return find_gpu(a.dtype, gpu);
}

// Of words first .. first + words - 1.
Logits logits_of(const memlm_cuda_linear_cross_entropy_args& a, int64_t first, int64_t words) {
  const int64_t bytes = bytes_of(a.dtype);
  Logits p = {};
  p.hidden = matrix(a.hidden, a.hidden_stride, a.m, a.k);
  p.weight = matrix(static_cast<const char*>(a.weight) + first * a.weight_stride * bytes, a.weight_stride,
                    words, a.k);
  p.bias = a.bias ? static_cast<const char*>(a.bias) + first * bytes : nullptr;
  p.k = static_cast<int>(a.k);
  p.tiles = static_cast<int>(ceil_div(words, kWords));
  p.targets = a.targets;
  return p;
}

}  // namespace
}  // namespace memlm::cuda

using namespace memlm;
using namespace memlm::cuda;

memlm_status memlm_cuda_linear_cross_entropy(const memlm_cuda_linear_cross_entropy_args* args,
                                             memlm_cuda_queue* queue) {
  Gpu gpu;
  MEMLM_PASS(check(args, &gpu));
  const memlm_cuda_linear_cross_entropy_args& a = *args;
  MEMLM_CHECK(!a.m || (a.losses && a.lse), "losses, lse: NULL");
  MEMLM_PASS(check_arrays(MEMLM_F32, "losses, lse", {a.losses, a.lse}));
  if (!a.m) return MEMLM_OK;
  Logits p = logits_of(a, 0, a.v);
  // As many shares of the vocabulary as give each multiprocessor its two blocks twice, of whole tiles.
  const int64_t token_blocks = ceil_div(a.m, kTokens);
  const int64_t wanted = ceil_div(static_cast<int64_t>(gpu.processors) * 4, token_blocks);
  p.tiles_here = static_cast<int>(ceil_div(p.tiles, wanted < p.tiles ? wanted : p.tiles));
  const int64_t shares = ceil_div(p.tiles, p.tiles_here), parts = shares * kWordWarps;
  MEMLM_PASS(need(queue, parts * a.m * static_cast<int64_t>(sizeof(Part))));
  Part* const workspace = static_cast<Part*>(queue->workspace);
  const auto kernel = a.dtype == MEMLM_F16 ? &logits_kernel<f16> : &logits_kernel<bf16>;
  MEMLM_PASS(started(launch(kernel, {token_blocks, shares}, kThreads, stages_of(gpu.arch) * kStageBytes,
                            queue->stream, p, workspace)));
  const Combine combine = {workspace, a.m, a.v, a.ignore_index, static_cast<int>(parts), a.label_smoothing,
                           a.targets, a.losses, a.lse};
  return started(launch(&combine_kernel, {ceil_div(a.m, kThreads)}, kThreads, 0, queue->stream, combine));
}

memlm_status memlm_cuda_linear_cross_entropy_backward(const memlm_cuda_linear_cross_entropy_args* args,
                                                      const memlm_cuda_linear_cross_entropy_grads* grads,
                                                      memlm_cuda_queue* queue) {
  Gpu gpu;
  MEMLM_PASS(check(args, &gpu));
  MEMLM_CHECK(grads, "grads: NULL");
  const memlm_cuda_linear_cross_entropy_args& a = *args;
  const memlm_cuda_linear_cross_entropy_grads& g = *grads;
  constexpr int64_t most_words = 65535 * kWords;
  MEMLM_CHECK(
      g.first >= 0 && g.words >= 0 && g.words <= most_words && g.first <= a.v && g.words <= a.v - g.first,
      "words: got %lld from %lld on, there are %lld, accepted are up to %lld at once",
      static_cast<ll>(g.words), static_cast<ll>(g.first), static_cast<ll>(a.v), static_cast<ll>(most_words));
  MEMLM_CHECK(!a.m || !g.words || (a.lse && g.grad && g.grad_logits), "lse, grad, grad_logits: NULL");
  MEMLM_PASS(check_arrays(MEMLM_F32, "lse, grad", {a.lse, g.grad}));
  MEMLM_PASS(check_arrays(a.dtype, "grad_logits", {g.grad_logits}));
  if (!a.m || !g.words) return MEMLM_OK;
  Logits p = logits_of(a, g.first, g.words);
  p.tiles_here = 1;
  const bool pairs = g.words % 2 == 0 && is_aligned(g.grad_logits, 4);
  const Gradient q = {a.lse, g.grad, a.ignore_index, a.label_smoothing,
                      a.label_smoothing / static_cast<float>(a.v), static_cast<int>(g.first), g.grad_logits,
                      g.words, pairs};
  const auto kernel = a.dtype == MEMLM_F16 ? &gradient_kernel<f16> : &gradient_kernel<bf16>;
  return started(launch(kernel, {ceil_div(a.m, kTokens), p.tiles}, kThreads,
                        stages_of(gpu.arch) * kStageBytes, queue->stream, p, q));
}
