// Float weights to packed codes, scales and offsets.  memlm/_rounding.py specifies the rounding, which holds
// here to the last bit, and says why it is as it is: operations come in its order, all are single f32
// operations rounded to nearest, and none are fused.
//
// Sums over a group are taken in the order of k, so that a thread has a group of one row.  A block has a
// tile, 16 rows, and 4 groups: it brings them to shared memory, w [k in the group][group, row], a row of
// which has one more number than the block threads, so that neither those that bring consecutive k nor those
// that read one k each wait for a bank.  A word of codes is a thread's, and those of a tile's 16 rows lie
// side by side.
//
//   thread      0 ... 15 | 16 ... 31 | 32 ... 47 | 48 ... 63
//   row         0 ... 15 |  0 ... 15 | ...
//   group       first    |  second   | ...
//
// 8 bits with one scale for a row have no sums: a block has a tile, whose rows it goes through twice.
#include <math.h>
#include <string.h>

#include "elements.h"
#include "host.h"

namespace memlm::cuda {
namespace {

constexpr int kTile = 16, kGroups = 4, kThreads = kTile * kGroups;
constexpr int kSharedRow = kThreads + 1;
constexpr int kCandidates = 7;

// Clipping candidates, as fractions of the group's range, for 16 levels and for 3 or 4.
constexpr double kShrink16[kCandidates] = {1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7};
constexpr double kShrink4[kCandidates] = {1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4};
constexpr float kMinNormal = 0x1p-126f, kMostUnit = 0x1p126f;

struct Quantize {
  int64_t n, w_stride;
  int k, words, bits, span, groups;  // words of codes of a row; k in a group
  int chunks;                        // blocks side by side along k
  const void* w;
  AnyElements of_w, of_scales;
  uint32_t* codes;
  void *scales, *offsets;
  float first, last;  // levels that are numbers
  int zero;           // the code of 0
  float levels[16], bounds[16];  // other levels; bounds[i] lies between level i and i + 1
  float ends[kCandidates], shrinks[kCandidates];  // of candidates: the scale of top, and the offset of it
};

// ---- Levels ----

MEMLM_DEVICE float least(float x, float y) { return x < y ? x : y; }
MEMLM_DEVICE float most(float x, float y) { return x > y ? x : y; }

// Consecutive numbers.
struct Numbers {
  float first, last;
  int zero;
  MEMLM_DEVICE Numbers(const Quantize& p, float*) : first(p.first), last(p.last), zero(p.zero) {}
  MEMLM_DEVICE int rounded(float x) const { return round_int(most(least(x, last), first)); }
  MEMLM_DEVICE float nearest(float x) const { return static_cast<float>(rounded(x)); }
  MEMLM_DEVICE int code(float x) const { return rounded(x) + zero; }
};

// 16 levels in any ascending order, in shared memory.
struct Table {
  const float *levels, *bounds;
  MEMLM_DEVICE Table(const Quantize& p, float* memory) : levels(memory), bounds(memory + 16) {
    if (thread() < 16) memory[thread()] = p.levels[thread()], memory[16 + thread()] = p.bounds[thread()];
  }
  MEMLM_DEVICE int code(float x) const {  // how many bounds lie below x: 8, 4, 2, 1 more
    int code = 0;
#pragma unroll
    for (int more = 8; more; more /= 2) code += bounds[code + more - 1] < x ? more : 0;
    return code;
  }
  MEMLM_DEVICE float nearest(float x) const { return levels[code(x)]; }
};

// ---- A group ----

MEMLM_DEVICE float inverse_or_zero(float s) { return fabsf(s) < kMinNormal ? 0 : 1 / s; }

// The numbers that a group is computed in: powers of two, about the middle of its range.
struct Unit {
  float unit, inverse, middle;
  MEMLM_DEVICE Unit(float top, float middle) : middle(middle) {
    unit = most(least(as_float(as_bits(top) & 0x7f800000), kMostUnit), kMinNormal);
    inverse = 1 / unit;
  }
};

struct Affine {
  float s, o;
};

// What scale and offset become where they are stored, as f16 if so.
template <bool offsets>
MEMLM_DEVICE Affine stored(const Unit& u, bool half, Affine a) {
  const auto as = [&](float x) { return half ? to_float(from_float<f16>(x)) : x; };
  return {as(multiply(a.s, u.unit)), offsets ? as(multiply(a.o, u.unit) + u.middle) : 0};
}

// Stored ones as numbers of the group's unit.
template <bool offsets>
MEMLM_DEVICE Affine loaded(const Unit& u, Affine a) {
  return {multiply(a.s, u.inverse), offsets ? multiply(a.o - u.middle, u.inverse) : 0};
}

// Where weights lie among the levels.
template <bool offsets>
struct Positions {
  float inverse, o;
  MEMLM_DEVICE explicit Positions(Affine a) : inverse(inverse_or_zero(a.s)), o(a.o) {}
  MEMLM_DEVICE float from_offset(float w) const { return offsets ? w - o : w; }
  MEMLM_DEVICE float operator()(float w) const { return multiply(from_offset(w), inverse); }
};

template <bool offsets, class Levels>
MEMLM_DEVICE float squared_error(const Levels& levels, const float* w, int span, Affine a) {
  const Positions<offsets> at(a);
  float sum = 0;
  for (int j = 0; j < span; j++) {
    const float x = at.from_offset(w[j * kSharedRow]);
    const float error = multiply(levels.nearest(multiply(x, at.inverse)), a.s) - x;
    sum += multiply(error, error);
  }
  return sum;
}

// Least squares for scale and offset, given the codes that a rounds to.  total: the sum of w.
template <bool offsets, class Levels>
MEMLM_DEVICE Affine refined(const Levels& levels, const float* w, int span, float total, Affine a) {
  const Positions<offsets> at(a);
  float dot = 0, squares = 0, count = 0;
  for (int j = 0; j < span; j++) {
    const float x = w[j * kSharedRow], value = levels.nearest(at(x));
    dot += multiply(x, value);
    squares += multiply(value, value);
    if (offsets) count += value;
  }
  if (!offsets) return {multiply(dot, inverse_or_zero(squares)), 0};
  const float share = 1.0f / static_cast<float>(span), mean = multiply(count, share);
  dot -= multiply(total, mean);
  squares -= multiply(count, mean);
  const float s = multiply(dot, inverse_or_zero(squares));
  return {s, multiply(total, share) - multiply(s, mean)};
}

// The scale and offset, as stored, with the least squared error that were found for a group in its unit, of
// which top is the end.
template <bool offsets, class Levels>
MEMLM_DEVICE Affine search(const Quantize& p, const Levels& levels, const float* w, float top, const Unit& u,
                           bool half) {
  float total = 0;
  for (int j = 0; offsets && j < p.span; j++) total += w[j * kSharedRow];
  Affine best = stored<offsets>(u, half, {multiply(top, p.ends[0]), -top});
  float error = squared_error<offsets>(levels, w, p.span, loaded<offsets>(u, best));
  // The first counts if it is a number; nothing is larger than an infinite one.
  float smallest = error < as_float(0x7f800000) ? error : as_float(0x7f800000);
  for (int i = 0; i < kCandidates; i++) {
    const Affine start = {multiply(top, p.ends[i]), multiply(top, p.shrinks[i])};
    const Affine found = stored<offsets>(u, half, refined<offsets>(levels, w, p.span, total, start));
    error = squared_error<offsets>(levels, w, p.span, loaded<offsets>(u, found));
    if (error < smallest) best = found, smallest = error;
  }
  return best;
}

MEMLM_DEVICE Affine of_8_bits(float top, const Unit& u, bool half) {
  return stored<false>(u, half, {fabsf(top) / 127, 0});
}

// ---- The kernels ----

template <bool offsets, class Levels>
__global__ void __launch_bounds__(kThreads) quantize_groups_kernel(const Quantize p) {
  float* const memory = shared<float>();  // levels, then w
  const Levels levels(p, memory);
  float* const weights = memory + 32;
  const int64_t tile = block_x() / p.chunks, row0 = tile * kTile;
  const int group0 = block_x() % p.chunks * kGroups, left = p.groups - group0;
  const int width = (left < kGroups ? left : kGroups) * p.span;
  for (int i = thread(); i < kTile * width; i += kThreads) {
    const int r = i / width, column = i % width, k = group0 * p.span + column;
    // Beyond k zeros, which must not stretch the range: where they could, the last weight again.
    const int from = offsets && k >= p.k ? p.k - 1 : k;
    const bool there = row0 + r < p.n && from < p.k;
    const float x = there ? p.of_w.read(p.w, (row0 + r) * p.w_stride + from) : 0;
    weights[column % p.span * kSharedRow + column / p.span * kTile + r] = x + 0.0f;  // -0 becomes 0
  }
  MEMLM_SYNC_THREADS();

  const int group = group0 + thread() / kTile, r = thread() % kTile;
  if (group >= p.groups) return;
  float* const w = weights + thread();
  float low = w[0], high = low;
  for (int j = 1; j < p.span; j++) {
    const float x = w[j * kSharedRow];
    low = least(x, low), high = most(x, high);
  }
  float top = high < -low ? low : high, middle = 0;
  if (offsets) {
    low = multiply(low, 0.5f), high = multiply(high, 0.5f);
    top = high - low, middle = low + high;
  }
  const Unit u(top, middle);
  top = multiply(top, u.inverse);
  for (int j = 0; j < p.span; j++) {
    const float x = w[j * kSharedRow];
    w[j * kSharedRow] = multiply(offsets ? x - middle : x, u.inverse);
  }
  const bool half = p.of_scales.dtype == MEMLM_F16;
  const Affine best = p.bits == 8 ? of_8_bits(top, u, half) : search<offsets>(p, levels, w, top, u, half);
  const bool real = row0 + r < p.n;
  const int64_t at = (tile * p.groups + group) * kTile + r;
  p.of_scales.write(p.scales, at, real ? best.s : 0);
  if (offsets) p.of_scales.write(p.offsets, at, real ? best.o : 0);

  const Positions<offsets> position(loaded<offsets>(u, best));
  const int numbers = 32 / p.bits, field_mask = (1 << p.bits) - 1;
  uint32_t* const codes = p.codes + (tile * p.words + group * (p.span / numbers)) * kTile + r;
  for (int first = 0; first < p.span; first += numbers) {
    uint32_t word = 0;
    for (int j = 0; j < numbers && real && group * p.span + first + j < p.k; j++) {
      const int code = levels.code(position(w[(first + j) * kSharedRow]));
      word |= static_cast<uint32_t>(code & field_mask) << (j % 4 * 8 + j / 4 * p.bits);
    }
    codes[first / numbers * kTile] = word;
  }
}

constexpr int kRowThreads = 256, kRowWarps = kRowThreads / kWarp;

// 8 bits, a scale for each row.  First each warp has two rows, then 8 rows and 4 words of each.
__global__ void __launch_bounds__(kRowThreads) quantize_rows_of_w_kernel(const Quantize p) {
  float* const largest = shared<float>();  // of each row
  const int64_t tile = block_x(), row0 = tile * kTile;
  for (int r = warp(); r < kTile; r += kRowWarps) {
    float size = 0;
    for (int k = lane(); row0 + r < p.n && k < p.k; k += kWarp) {
      size = most(fabsf(p.of_w.read(p.w, (row0 + r) * p.w_stride + k)), size);
    }
    for (int mask = kWarp / 2; mask; mask /= 2) size = most(shuffle_xor(size, mask), size);
    if (lane() == 0) largest[r] = size;
  }
  MEMLM_SYNC_THREADS();

  constexpr int kLaneRows = 8, kWarpWords = kWarp / kLaneRows;
  const Numbers levels(p, nullptr);
  for (int r = lane() % kLaneRows; r < kTile; r += kLaneRows) {
    const bool real = row0 + r < p.n;
    const Unit u(largest[r], 0);
    const Affine best = of_8_bits(multiply(largest[r], u.inverse), u, p.of_scales.dtype == MEMLM_F16);
    if (thread() < kLaneRows) p.of_scales.write(p.scales, tile * kTile + r, real ? best.s : 0);
    const Positions<false> position(loaded<false>(u, best));
    for (int i = warp() * kWarpWords + lane() / kLaneRows; i < p.words; i += kRowWarps * kWarpWords) {
      uint32_t word = 0;
      for (int j = 0; j < 4 && real && 4 * i + j < p.k; j++) {
        const float x = p.of_w.read(p.w, (row0 + r) * p.w_stride + 4 * i + j);
        word |= static_cast<uint32_t>(levels.code(position(multiply(x, u.inverse))) & 0xff) << 8 * j;
      }
      p.codes[(tile * p.words + i) * kTile + r] = word;
    }
  }
}

// ---- The host's side ----

// Levels, and candidates for scale and offset of a group's end.
void describe_levels(const memlm_quantize_args* args, Quantize* p) {
  p->first = args->offsets ? 0 : args->bits == 8 ? -127 : args->bits == 4 ? -8 : -1;
  const int levels = args->ternary ? 3 : 1 << args->bits;
  p->last = args->bits == 8 ? 127 : p->first + static_cast<float>(levels - 1);
  p->zero = args->offsets || args->bits == 8 ? 0 : static_cast<int>(-p->first);
  double low = p->first, high = p->last;
  if (args->levels) {
    memcpy(p->levels, args->levels, sizeof p->levels);
    for (int i = 0; i < 15; i++) p->bounds[i] = (args->levels[i + 1] + args->levels[i]) / 2;
    low = args->levels[0], high = args->levels[15];
  }
  // What the end of the range is a scale of: half of the levels' range, or the level of largest magnitude.
  const double reach = args->offsets ? high / 2 : fabs(low) >= fabs(high) ? low : high;
  for (int i = 0; i < kCandidates; i++) {
    const double shrink = args->bits == 4 ? kShrink16[i] : kShrink4[i];
    p->ends[i] = static_cast<float>(shrink / reach);
    p->shrinks[i] = static_cast<float>(-shrink);
  }
}

memlm_status check_quantize(const memlm_quantize_args* args) {
  MEMLM_CHECK(args && args->w, "w: NULL");
  const memlm_packed w = {args->codes, args->scales, args->offsets, args->scale_dtype, args->n,  args->k,
                          args->group, args->levels, MEMLM_DENSE,   nullptr,           nullptr};
  MEMLM_CHECK(args->bits == 2 || args->bits == 4 || args->bits == 8, "bits: got %d, accepted are 2, 4 and 8",
              args->bits);
  MEMLM_PASS(check_packed(&w, args->bits));
  MEMLM_CHECK(args->w_stride >= args->k, "w_stride: got %lld, at least k = %lld is needed",
              static_cast<long long>(args->w_stride), static_cast<long long>(args->k));
  MEMLM_PASS(check_arrays(args->dtype, "w", {args->w}));
  for (int i = 1; args->levels && i < 16; i++) {
    MEMLM_CHECK(args->levels[i - 1] < args->levels[i], "levels: number %d is %g, after %g; they must ascend",
                i, static_cast<double>(args->levels[i]), static_cast<double>(args->levels[i - 1]));
  }
  MEMLM_CHECK(!args->ternary || (args->bits == 2 && !args->offsets),
              "ternary: is for 2 bits without offsets");
  return MEMLM_OK;
}

}  // namespace
}  // namespace memlm::cuda

using namespace memlm;
using namespace memlm::cuda;

memlm_status memlm_cuda_quantize_weight(const memlm_quantize_args* args, memlm_cuda_queue* queue) {
  MEMLM_PASS(check_quantize(args));
  Gpu gpu;
  MEMLM_PASS(find_gpu(MEMLM_F16, &gpu));
  const int64_t padded = round_up(args->k, args->group > 32 ? args->group : 32);
  const int64_t tiles = ceil_div(args->n, kTile);
  Quantize p = {};
  p.n = args->n;
  p.w_stride = args->w_stride;
  p.k = static_cast<int>(args->k);
  p.words = static_cast<int>(padded * args->bits / 32);
  p.bits = args->bits;
  p.span = static_cast<int>(args->group);
  p.groups = static_cast<int>(args->group ? padded / args->group : 1);
  p.chunks = static_cast<int>(ceil_div(p.groups, kGroups));
  p.w = args->w;
  p.of_w = {args->dtype};
  p.of_scales = {args->scale_dtype};
  p.codes = static_cast<uint32_t*>(args->codes);
  p.scales = args->scales;
  p.offsets = args->offsets;
  describe_levels(args, &p);
  if (!args->group) {
    return started(launch(&quantize_rows_of_w_kernel, {tiles}, kRowThreads, kTile * 4, queue->stream, p));
  }
  MEMLM_CHECK(tiles <= INT32_MAX / p.chunks, "w: got %lld rows of %lld, which are too many for one call",
              static_cast<long long>(args->n), static_cast<long long>(args->k));
  const auto kernel = args->levels    ? &quantize_groups_kernel<false, Table>
                      : args->offsets ? &quantize_groups_kernel<true, Numbers>
                                      : &quantize_groups_kernel<false, Numbers>;
  const int bytes = (32 + p.span * kSharedRow) * 4;
  return started(launch(kernel, {tiles * p.chunks}, kThreads, bytes, queue->stream, p));
}
