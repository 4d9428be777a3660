// The largest logits of a linear layer: each thread multiplies some tiles of W at a time into a buffer
// of its own, and keeps the largest of what it finds there.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <new>

#include "linear.h"
#include "threads.h"
#include "workspace.h"

namespace memlm {
namespace {

struct Logit {
  float value;
  int64_t index;
};

bool is_nan(float x) { return x != x; }

// Whether x comes before y: the order is total, so the result depends on no thread.
bool before(Logit x, Logit y) {
  if (is_nan(x.value) || is_nan(y.value)) {
    if (is_nan(x.value) != is_nan(y.value)) return is_nan(x.value);
  } else if (x.value != y.value) {
    return x.value > y.value;
  }
  return x.index < y.index;
}

// The first k logits in that order, of those shown.
class Best {
 public:
  Best(Logit* room, int64_t k) : logits_(room), k_(k) {}

  void show(const float* values, int64_t count, int64_t first_index) {
    constexpr int64_t kRun = 32;
    for (int64_t i = 0; i < count; i += kRun) {
      const int64_t end = std::min(i + kRun, count);
      // Most runs hold nothing: one look without branches.  What is not below the last may come
      // before it, and so may NaN.
      const float last = count_ < k_ ? -INFINITY : logits_[k_ - 1].value;
      int any = 0;
      for (int64_t j = i; j < end; ++j) any |= !(values[j] < last);
      for (int64_t j = i; any && j < end; ++j) add({values[j], first_index + j});
    }
  }

  void add(Logit logit) {
    if (count_ == k_ && !before(logit, logits_[k_ - 1])) return;
    int64_t at = count_ < k_ ? count_++ : k_ - 1;
    for (; at > 0 && before(logit, logits_[at - 1]); --at) logits_[at] = logits_[at - 1];
    logits_[at] = logit;
  }

  int64_t count() const { return count_; }
  const Logit& operator[](int64_t i) const { return logits_[i]; }

 private:
  Logit* logits_;
  int64_t k_, count_ = 0;
};

memlm_status check(const memlm_linear* linear, const memlm_matmul_args* args, int64_t k,
                   const float* values, const int64_t* indices) {
  if (!linear) return fail(MEMLM_INVALID, "linear: is NULL");
  if (memlm_status s = check_linear(*linear)) return s;
  if (!args) return fail(MEMLM_INVALID, "args: is NULL");
  if (args->m < 0 || args->m > INT32_MAX)
    return fail(MEMLM_INVALID, "m: got %lld, accepted is 0 to 2^31-1", (long long)args->m);
  if (!is_dtype(args->dtype))
    return fail(MEMLM_INVALID, "dtype: got %d, accepted are f32, f16, bf16", args->dtype);
  if (args->x_stride < linear->w.k)
    return fail(MEMLM_INVALID, "x_stride: got %lld, x has %lld columns", (long long)args->x_stride,
                (long long)linear->w.k);
  if (args->threads < 1)
    return fail(MEMLM_INVALID, "threads: got %d, at least 1 is needed", args->threads);
  if (k < 1 || k > linear->w.n)
    return fail(MEMLM_INVALID, "k: got %lld, accepted is 1 to n, %lld", (long long)k,
                (long long)linear->w.n);
  if (args->m > 0 && (!args->x || !values || !indices))
    return fail(MEMLM_INVALID, "%s: is NULL", !args->x ? "x" : !values ? "values" : "indices");
  return MEMLM_OK;
}

// Tiles multiplied at a time: many, as x is rounded anew for each piece, but so few that threads share
// the work evenly and the logits stay in an L2.
int64_t tiles_per_piece(int64_t tiles, int64_t m, int threads) {
  constexpr int64_t kPiecesPerThread = 16, kBytes = 128 * 1024;
  const int64_t even = div_up(tiles, threads * kPiecesPerThread);
  return std::max<int64_t>(1, std::min(even, kBytes / (m * kTileRows * 4)));
}

}  // namespace
}  // namespace memlm

using namespace memlm;

memlm_status memlm_matmul_topk(const memlm_linear* linear, const memlm_matmul_args* args, int64_t k,
                               float* values, int64_t* indices) {
  if (memlm_status s = check(linear, args, k, values, indices)) return s;
  const int64_t m = args->m, n = linear->w.n;
  if (m == 0) return MEMLM_OK;
  const int threads = useful_threads(static_cast<double>(m) * n * linear->w.k, args->threads);
  const int64_t tiles = div_up(n, kTileRows), piece = tiles_per_piece(tiles, m, threads);

  memlm_matmul_args part = {};
  part.m = m;
  part.x = args->x;
  part.x_stride = args->x_stride;
  part.threads = 1;
  const int64_t stride = div_up(linear->w.k, 16) * 16;
  const bool as_it_is = args->dtype == MEMLM_F32 && !args->norm;
  const auto x = workspace<float>(as_it_is ? 0 : m * stride);
  const auto bias = workspace<float>(linear->bias ? div_up(n, 16) * 16 : 0);
  const auto logits = workspace<float>(threads * m * piece * kTileRows);
  const auto room = workspace<Logit>(threads * m * k);
  const auto bests = workspace<Best>(threads * m);
  if (!x || !bias || !logits || !room || !bests)
    return fail(MEMLM_NO_MEMORY, "no memory for the workspace");
  if (!as_it_is) {
    memlm_matmul_args all = *args;
    all.m = m;
    kernels().rows_to_f32(all, linear->w.k, stride, x.get());
    part.x = x.get();
    part.x_stride = stride;
  }
  if (linear->bias) {
    memlm_matmul_args row = {};
    row.m = 1;
    row.x = linear->bias;
    row.dtype = args->dtype;
    kernels().rows_to_f32(row, n, div_up(n, 16) * 16, bias.get());
  }
  for (int64_t i = 0; i < threads * m; ++i) new (&bests[i]) Best(&room[i * k], k);

  std::atomic<memlm_status> status{MEMLM_OK};
  parallel_for(div_up(tiles, piece), 1, threads, [&](int64_t begin, int64_t end, int slot) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * piece;
      memlm_linear some = tiles_of(*linear, first, std::min(first + piece, tiles));
      if (linear->bias) some.bias = &bias[first * kTileRows];
      memlm_matmul_args here = part;
      here.y = &logits[slot * m * piece * kTileRows];
      here.y_stride = some.w.n;
      if (const memlm_status s = multiply(some, here)) {
        status = s;
        return;
      }
      for (int64_t row = 0; row < m; ++row)
        bests[slot * m + row].show(static_cast<float*>(here.y) + row * some.w.n, some.w.n,
                                   first * kTileRows);
    }
  });
  if (status != MEMLM_OK) return said(status);
  for (int64_t row = 0; row < m; ++row) {
    Best& best = bests[row];
    for (int slot = 1; slot < threads; ++slot) {
      const Best& other = bests[slot * m + row];
      for (int64_t i = 0; i < other.count(); ++i) best.add(other[i]);
    }
    for (int64_t i = 0; i < k; ++i) {
      values[row * k + i] = best[i].value;
      indices[row * k + i] = best[i].index;
    }
  }
  return MEMLM_OK;
}
