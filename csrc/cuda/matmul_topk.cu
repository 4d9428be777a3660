// The largest logits of each row of y = x W^T + bias.
//
// The product runs a panel of W's features at a time, and only the panel's logits are stored, in f32.  A
// panel is as many features as give each multiprocessor two blocks of the product; two kernels follow it: one
// whose blocks each find the largest of up to kChunk logits of a row, and one that finds the largest of those
// and of what earlier panels had.
//
// A logit and its index are one integer of 64 bits, a key, whose order is that of the result: the bits of the
// value so that they ascend with it, NaN above all, -0 as 0; below them the index, inverted, as the lowest
// comes first.  No two keys are equal, so that the result depends on no order of work.
//
//   key    63 ... 32: the value    31 ... 0: 0xffffffff - index        0: nothing
//
// Workspace: rows of x made ready; sums that blocks of the product share; up to 2 x 64 KB of logits for each
// multiprocessor; 8 bytes for each of `top` keys of a chunk, and of a row.  Rows beyond kMostRows, or so many
// that a panel would have less than 256 features, are another round.
#include "quantize_rows.h"
#include "rows.h"
#include "w8a8_matmul.h"
#include "weight_only.h"

namespace memlm::cuda {
namespace {

constexpr int64_t kMostRows = 4096;
constexpr int64_t kBlockLogits = 16384;   // of a block of the product at most: 64 tokens and 256 features
constexpr int64_t kLeastFeatures = 256;
constexpr int kChunk = 8192;              // logits that a block looks through
constexpr int kMostTop = 2048;
constexpr int kAtOnce = 4, kStepKeys = kAtOnce * kThreads;  // a block looks at between two barriers

// ---- Keys ----

MEMLM_DEVICE uint64_t key_of(float value, uint32_t index) {
  const uint32_t bits = as_bits(value + 0.0f);  // -0 becomes 0
  const uint32_t order = value != value ? kAll : bits >> 31 ? ~bits : bits | 0x80000000;
  return static_cast<uint64_t>(order) << 32 | (kAll - index);
}
MEMLM_DEVICE float value_of(uint64_t key) {
  const uint32_t order = static_cast<uint32_t>(key >> 32);
  return as_float(order >> 31 ? order & 0x7fffffff : ~order);  // all bits: a NaN
}
MEMLM_DEVICE int64_t index_of(uint64_t key) { return kAll - static_cast<uint32_t>(key); }

// Keys that a block keeps at once: the largest so far, and those of one step more.
inline int room_of(int64_t top) {
  int room = 1;
  while (room < top + kStepKeys) room *= 2;
  return room;
}

struct Kept {
  int count;
  uint64_t keys[1];  // room of them
};
inline int kept_bytes(int room) { return static_cast<int>(sizeof(Kept)) + room * 8; }

// Sorts the first `count` keys, largest first, and puts 0 behind them until there are `top`: a bitonic sort.
MEMLM_DEVICE void sort(uint64_t* keys, int count, int top) {
  int size = 2;
  while (size < count || size < top) size *= 2;
  for (int i = count + thread(); i < size; i += kThreads) keys[i] = 0;
  MEMLM_SYNC_THREADS();
  for (int run = 2; run <= size; run *= 2) {
    for (int apart = run / 2; apart; apart /= 2) {
      for (int i = thread(); i < size / 2; i += kThreads) {
        const int one = 2 * i - (i & (apart - 1)), other = one + apart;
        const bool falls = (one & run) == 0;
        const uint64_t a = keys[one], b = keys[other];
        if ((a < b) == falls) keys[one] = b, keys[other] = a;
      }
      MEMLM_SYNC_THREADS();
    }
  }
}

// The `top` largest of key(0) .. key(count - 1), none of which comes twice, sorted, to kept->keys.
template <class Key>
MEMLM_DEVICE void find_largest(const Key& key, int count, int top, int room, Kept* kept) {
  if (thread() == 0) kept->count = 0;
  MEMLM_SYNC_THREADS();
  int held = 0;
  uint64_t least = 0;  // what is not above it is none of them
  for (int first = 0; first < count; first += kStepKeys) {
    if (held + kStepKeys > room) {
      sort(kept->keys, held, top);
      held = top;
      least = kept->keys[top - 1];
      if (thread() == 0) kept->count = held;
      MEMLM_SYNC_THREADS();
    }
    uint64_t mine[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; i++) {
      const int at = first + i * kThreads + thread();
      mine[i] = at < count ? key(at) : 0;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; i++) {
      const uint32_t above = ballot(mine[i] > least);
      if (!above) continue;
      int place = 0;
      if (lane() == 0) place = atomic_add(&kept->count, count_bits(above));
      place = shuffle(place, 0) + count_bits(above & ((1u << lane()) - 1));
      if (mine[i] > least) kept->keys[place] = mine[i];
    }
    MEMLM_SYNC_THREADS();
    held = kept->count;
    MEMLM_SYNC_THREADS();
  }
  sort(kept->keys, held, top);
}

// ---- The kernels ----

struct Panel {
  const float* logits;   // [rows, stride]
  int64_t stride;
  int first, features;   // of W
  uint64_t* keys;        // [rows, slots, top]: of earlier panels; of each chunk
  int slots, top, room;
};

// A block for each chunk of a row.
__global__ void __launch_bounds__(kThreads) chunk_kernel(const Panel p) {
  Kept* const kept = shared<Kept>();
  const int begin = block_x() * kChunk, left = p.features - begin;
  const int64_t row = block_y();
  const float* const logits = p.logits + row * p.stride + begin;
  const auto key = [&](int i) { return key_of(logits[i], p.first + begin + i); };
  find_largest(key, left < kChunk ? left : kChunk, p.top, p.room, kept);
  uint64_t* const to = p.keys + (row * p.slots + 1 + block_x()) * p.top;
  for (int i = thread(); i < p.top; i += kThreads) to[i] = kept->keys[i];
}

// A block for each row.  values: NULL before the last panel.
__global__ void __launch_bounds__(kThreads) row_kernel(const Panel p, int chunks, float* values,
                                                       int64_t* indices) {
  Kept* const kept = shared<Kept>();
  const int64_t row = block_x();
  uint64_t* const keys = p.keys + row * p.slots * p.top;
  const int earlier = p.first ? 0 : p.top;  // the first panel has none before it
  find_largest([&](int i) { return keys[earlier + i]; }, (1 + chunks) * p.top - earlier, p.top, p.room, kept);
  for (int i = thread(); i < p.top; i += kThreads) {
    const uint64_t key = kept->keys[i];
    if (values) {
      values[row * p.top + i] = value_of(key);
      indices[row * p.top + i] = index_of(key);
    } else {
      keys[i] = key;
    }
  }
}

// ---- The host's side ----

// Features first .. first + n - 1, of whole tiles unless they are the last.
memlm_packed some_rows(const memlm_packed& w, int bits, int64_t first, int64_t n) {
  const int64_t k = padded_k(&w), tile = first / kTile;
  const int64_t scales = tile * (w.group ? k / w.group : 1) * kTile * bytes_of(w.scale_dtype);
  memlm_packed some = w;
  some.n = n;
  some.codes = static_cast<const uint8_t*>(w.codes) + tile * k * kTile * bits / 8;
  some.scales = static_cast<const uint8_t*>(w.scales) + scales;
  if (w.offsets) some.offsets = static_cast<const uint8_t*>(w.offsets) + scales;
  return some;
}

// A call, and how it goes about it.
struct TopK {
  const memlm_linear* linear;
  const memlm_matmul_args* args;
  Gpu gpu;
  void* stream;
  bool integers;           // x is rounded to int8
  int64_t top, rows;       // rows of a round
  int64_t features, slots;  // of a panel
  // Workspace: the product's, x made ready, its scales, logits, keys.
  int64_t product_bytes, x_bytes, scale_bytes, logit_bytes, key_bytes;

  memlm_status plan();
  memlm_status run(char* workspace, float* values, int64_t* indices) const;

 private:
  bool x_is_ready() const { return !integers && are_ready(args, linear->w.k); }
  int64_t x_stride() const { return integers ? round_up(linear->w.k, 16) : ready_stride(linear->w.k); }
  memlm_matmul_args some_args(int64_t row, int64_t count) const;
  memlm_status multiply(const memlm_packed& w, const memlm_matmul_args& some, const void* x, int64_t stride,
                        const float* scales, char* workspace) const;
};

memlm_matmul_args TopK::some_args(int64_t row, int64_t count) const {
  memlm_matmul_args some = {};
  some.m = count;
  some.x = static_cast<const char*>(args->x) + row * args->x_stride * bytes_of(args->dtype);
  some.x_stride = args->x_stride;
  some.dtype = args->dtype;
  some.norm = args->norm;
  some.norm_eps = args->norm_eps;
  some.y_stride = round_up(features, 4);
  return some;
}

memlm_status TopK::plan() {
  const memlm_packed& w = linear->w;
  const int64_t tiles = 2 * gpu.processors * kBlockLogits / kLeastFeatures;  // of kLeastFeatures logits
  rows = args->m;
  for (const int64_t most : {kMostRows, tiles}) rows = rows < most ? rows : most;
  features = tiles / rows * kLeastFeatures;
  if (features > w.n) features = w.n;
  const int64_t chunks = ceil_div(features, kChunk);
  slots = 1 + chunks;
  // Rounds and panels of two sizes each have plans of their own.
  product_bytes = 0;
  for (const int64_t m : {rows, args->m % rows}) {
    for (const int64_t n : {features, w.n % features}) {
      if (!m || !n) continue;
      const memlm_packed some = some_rows(w, linear->bits, 0, n);
      const memlm_matmul_args with = some_args(0, m);
      Product product = {};
      Plan plan;
      MEMLM_PASS(plan_product(&some, &with, gpu, stream, &product, &plan));
      const int64_t bytes = plan.counter_bytes + plan.sum_bytes;
      product_bytes = bytes > product_bytes ? bytes : product_bytes;
    }
  }
  x_bytes = x_is_ready() ? 0 : round_up(rows * x_stride() * (integers ? 1 : 2), 256);
  scale_bytes = integers ? round_up(rows * 4, 256) : 0;
  logit_bytes = round_up(rows * round_up(features, 4) * 4, 256);
  key_bytes = rows * slots * top * 8;
  return MEMLM_OK;
}

// The logits of some rows and features, of x that is ready.
memlm_status TopK::multiply(const memlm_packed& w, const memlm_matmul_args& some, const void* x,
                            int64_t stride, const float* scales, char* workspace) const {
  if (integers) {
    return multiply_ready(&w, &some, {static_cast<const int8_t*>(x), stride, scales}, gpu, workspace, stream);
  }
  WeightOnly p = {};
  Plan plan;
  MEMLM_PASS(describe(&w, linear->bits, &some, &p));
  MEMLM_PASS(plan_product(&w, &some, gpu, stream, &p, &plan));
  store_f32(&p);
  MEMLM_PASS(begin_product(workspace, plan, &p));
  p.x = x;
  p.x_stride = stride;
  const Launchers& launchers = linear->bits == 2   ? kLaunchersOf2
                               : linear->bits == 8 ? kLaunchersOf8
                               : w.levels          ? kLaunchersOfLevels
                                                   : kLaunchersOf4;
  return (some.dtype == MEMLM_F16 ? launchers.of_f16 : launchers.of_bf16)(p, plan);
}

memlm_status TopK::run(char* workspace, float* values, int64_t* indices) const {
  const memlm_packed& w = linear->w;
  char* const ready = workspace + product_bytes;
  float* const scales = reinterpret_cast<float*>(ready + x_bytes);
  char* const logits = ready + x_bytes + scale_bytes;
  for (int64_t row = 0; row < args->m; row += rows) {
    const int64_t count = args->m - row < rows ? args->m - row : rows;
    memlm_matmul_args some = some_args(row, count);
    if (integers) {
      MEMLM_PASS(begin_quantize_rows(count, w.k, some.x, some.x_stride, some.dtype, some.norm, some.norm_eps,
                                     0, {reinterpret_cast<int8_t*>(ready), x_stride(), scales, 1, rows},
                                     stream));
    } else if (!x_is_ready()) {
      MEMLM_PASS(ready_rows(&some, w.k, ready, stream));
    }
    const void* const x = x_is_ready() ? some.x : ready;
    const int64_t stride = x_is_ready() ? some.x_stride : x_stride();
    some.y = logits;
    Panel p = {};
    p.logits = reinterpret_cast<const float*>(logits);
    p.stride = some.y_stride;
    p.keys = reinterpret_cast<uint64_t*>(logits + logit_bytes);
    p.slots = static_cast<int>(slots);
    p.top = static_cast<int>(top);
    p.room = room_of(top);
    for (int64_t first = 0; first < w.n; first += features) {
      const bool last = w.n - first <= features;
      const int64_t n = last ? w.n - first : features;
      if (linear->bias) some.bias = static_cast<const char*>(linear->bias) + first * bytes_of(some.dtype);
      MEMLM_PASS(multiply(some_rows(w, linear->bits, first, n), some, x, stride, scales, workspace));
      p.first = static_cast<int>(first);
      p.features = static_cast<int>(n);
      const int64_t chunks = ceil_div(n, kChunk);
      MEMLM_PASS(started(launch(&chunk_kernel, {chunks, count}, kThreads, kept_bytes(p.room), stream, p)));
      MEMLM_PASS(started(launch(&row_kernel, {count}, kThreads, kept_bytes(p.room), stream, p, chunks,
                                last ? values + row * top : nullptr, last ? indices + row * top : nullptr)));
    }
  }
  return MEMLM_OK;
}

memlm_status check(const memlm_linear* linear, const memlm_matmul_args* args, int64_t top,
                   const float* values, const int64_t* indices) {
  MEMLM_CHECK(linear && args, "linear, args: NULL");
  const int bits = linear->bits;
  MEMLM_CHECK(bits == 2 || bits == 4 || bits == 8, "bits: got %d, accepted are 2, 4 and 8", bits);
  MEMLM_PASS(check_packed(&linear->w, bits));
  const memlm_mode mode = linear->mode;
  MEMLM_CHECK(mode == MEMLM_ACCURATE || mode == MEMLM_FAST || (mode == MEMLM_W8A8 && bits == 8),
              "mode: got %d for %d bits", static_cast<int>(mode), bits);
  MEMLM_CHECK(mode != MEMLM_W8A8 || linear->w.k <= kMostIntK, "k: got %lld, at most %lld are accepted",
              static_cast<long long>(linear->w.k), static_cast<long long>(kMostIntK));
  MEMLM_CHECK(args->m >= 0 && args->m <= INT32_MAX, "m: got %lld, accepted are 0 to 2^31 - 1",
              static_cast<long long>(args->m));
  MEMLM_CHECK(args->x_stride >= linear->w.k, "x_stride: got %lld, at least k = %lld is needed",
              static_cast<long long>(args->x_stride), static_cast<long long>(linear->w.k));
  MEMLM_CHECK(top >= 1 && top <= linear->w.n, "k: got %lld, accepted is 1 to n, %lld",
              static_cast<long long>(top), static_cast<long long>(linear->w.n));
  MEMLM_CHECK(!args->m || (args->x && values && indices), "x, values, indices: NULL");
  MEMLM_CHECK(is_aligned(values, 4) && is_aligned(indices, 8), "values, indices: not aligned to an element");
  return check_arrays(args->dtype, "x, bias, norm", {args->x, linear->bias, args->norm});
}

}  // namespace
}  // namespace memlm::cuda

using namespace memlm;
using namespace memlm::cuda;

memlm_status memlm_cuda_matmul_topk(const memlm_linear* linear, const memlm_matmul_args* args, int64_t k,
                                    float* values, int64_t* indices, memlm_cuda_queue* queue) {
  MEMLM_PASS(check(linear, args, k, values, indices));
  if (k > kMostTop) {
    return fail(MEMLM_UNSUPPORTED, "k: got %lld, the GPU's kernel finds up to %d", static_cast<long long>(k),
                kMostTop);
  }
  TopK call = {};
  call.integers = linear->mode == MEMLM_W8A8;
  MEMLM_PASS(find_gpu(call.integers ? MEMLM_F16 : args->dtype, &call.gpu));
  if (!args->m) return MEMLM_OK;
  call.linear = linear;
  call.args = args;
  call.stream = queue->stream;
  call.top = k;
  MEMLM_PASS(call.plan());
  const int64_t before = call.product_bytes + call.x_bytes + call.scale_bytes;
  MEMLM_PASS(need(queue, before + call.logit_bytes + call.key_bytes));
  return call.run(static_cast<char*>(queue->workspace), values, indices);
}
