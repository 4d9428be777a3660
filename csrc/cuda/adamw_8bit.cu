// A step of AdamW with moments in 8 bits.  memlm/ops/adamw_8bit.py is the specification of the step and
// memlm/dynamic_codes.py that of the codes, to the last bit: all operations are single f32 ones, rounded to
// nearest, in their order.
//
// A warp takes a block of 256 numbers, which has one scale for each moment, so that the largest magnitude
// needs shuffles alone; a lane takes eight of them, such that a warp reads and writes whole sectors:
//
//   lane l   numbers 4l .. 4l + 3 and 128 + 4l .. 128 + 4l + 3
//
// What is moved is what there is: param and grad read, param written, codes read and written, a byte each.
// The tables of levels lie in shared memory, filled once for all blocks of a thread block, of which so many
// are begun as the multiprocessors hold.
#include "../adamw_8bit.h"

#include "elements.h"
#include "host.h"
#include "magnitude.h"

namespace memlm::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kHalves = 2, kHalf = kMomentBlock / kHalves;
static_assert(kHalf == 4 * kWarp);
constexpr int kBlocksAProcessor = 4;

// How numbers with so many bounds below them are rounded.
struct alignas(16) Rounding {
  float multiply, add;
  int least, most;
};

struct Tables {
  float levels[256];
  Rounding rounding[kBounds + 1];
};

Tables tables_of(const DynamicCodes& codes) {
  Tables t = {};
  for (int i = 0; i < 256; i++) t.levels[i] = codes.levels[i];
  for (int c = 0; c <= kBounds; c++) {
    t.rounding[c] = {codes.multiply[c], codes.add[c], static_cast<int>(codes.least[c]),
                     static_cast<int>(codes.most[c])};
  }
  return t;
}

struct Step {
  int64_t count, blocks;
  void* param;
  const void* grad;
  uint8_t* codes[2];  // of the first and the second moment
  float* absmax[2];
  bool aligned;  // whether four numbers of each array may be moved at once
  AdamWFactors f;
  float bounds[2][kBounds];
  Tables tables[2];
};

// Four numbers of a block, of which `left` exist; others are 0.
template <class T>
MEMLM_DEVICE void read_four(const T* from, int left, bool at_once, float (&to)[4]) {
  if (at_once) {
    load_four(from, to);
  } else {
    for (int j = 0; j < 4; j++) to[j] = j < left ? to_float(from[j]) : 0;
  }
}

template <class T>
MEMLM_DEVICE void write_four(T* to, int left, bool at_once, const float (&v)[4]) {
  if (at_once) {
    store_four(to, v);
  } else {
    for (int j = 0; j < 4 && j < left; j++) to[j] = from_float<T>(v[j]);
  }
}

MEMLM_DEVICE uint32_t read_codes(const uint8_t* from, int left, bool at_once) {
  if (at_once) return load<uint32_t>(from);
  uint32_t codes = 0;
  for (int j = 0; j < 4 && j < left; j++) codes |= static_cast<uint32_t>(from[j]) << 8 * j;
  return codes;
}

MEMLM_DEVICE void write_codes(uint8_t* to, int left, bool at_once, uint32_t codes) {
  if (at_once) {
    store(to, codes);
  } else {
    for (int j = 0; j < 4 && j < left; j++) to[j] = static_cast<uint8_t>(codes >> 8 * j);
  }
}

// x of at most about 1, as multiples of the largest of its block.
template <bool is_signed>
MEMLM_DEVICE uint32_t code_of(float x, const float (&bounds)[kBounds], const Rounding* rounding) {
  const float size = x < 0 ? -x : x;
  int below = 0;
#pragma unroll
  for (int b = 0; b < kBounds; b++) below += bounds[b] < size;
  const Vec4 r = load<Vec4>(rounding + below);
  int j = round_int(multiply(size, as_float(r.x)) + as_float(r.y));
  const int least = static_cast<int>(r.z), most = static_cast<int>(r.w);
  j = j < least ? least : j > most ? most : j;
  if (!is_signed) return static_cast<uint32_t>(j - 1);
  return static_cast<uint32_t>(x < 0 ? kSignedZero - (j < kSignedZero ? j : kSignedZero) : kSignedZero + j);
}

// Stores a block's moment, and the largest magnitude that its codes are fractions of.
template <bool is_signed>
MEMLM_DEVICE void encode(const float (&values)[kHalves][4], const float (&bounds)[kBounds],
                         const Rounding* rounding, uint8_t* codes, float* absmax, int left, bool at_once) {
  uint32_t largest = 0;
  for (const auto& half : values) {
    for (const float value : half) largest = magnitude(value) > largest ? magnitude(value) : largest;
  }
  largest = largest_of_warp(largest);
  const float most = as_float(largest), inverse = 1 / most;
  const bool finite = largest < kInfinity, usable = finite && magnitude(inverse) < kInfinity;
  if (lane() == 0) *absmax = !finite ? as_float(0x7fc00000) : usable ? most : 0;
#pragma unroll
  for (int h = 0; h < kHalves; h++) {
    uint32_t word = 0;
    for (int j = 0; j < 4; j++) {
      const float x = usable ? multiply(values[h][j], inverse) : 0;
      word |= code_of<is_signed>(x, bounds, rounding) << 8 * j;
    }
    write_codes(codes + h * kHalf, left - h * kHalf, at_once, word);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksAProcessor) adamw_8bit_kernel(const Step p) {
  Tables* const tables = shared<Tables>();
  for (int t = 0; t < 2; t++) {
    tables[t].levels[thread()] = p.tables[t].levels[thread()];
    if (thread() <= kBounds) tables[t].rounding[thread()] = p.tables[t].rounding[thread()];
  }
  static_assert(kThreads == 256);
  MEMLM_SYNC_THREADS();

  const int64_t stride = static_cast<int64_t>(blocks_x()) * kWarps;
  for (int64_t block = static_cast<int64_t>(block_x()) * kWarps + warp(); block < p.blocks; block += stride) {
    const int64_t start = block * kMomentBlock + 4 * lane();
    const int64_t rest = p.count - start;  // of the numbers, from the lane's first on
    const int left = rest < kMomentBlock ? static_cast<int>(rest) : kMomentBlock;
    const bool at_once = p.aligned && p.count - block * kMomentBlock >= kMomentBlock;
    T* const param = static_cast<T*>(p.param) + start;
    const T* const grad = static_cast<const T*>(p.grad) + start;
    const float absmax[2] = {p.absmax[0][block], p.absmax[1][block]};
    float m[kHalves][4], v[kHalves][4];
#pragma unroll
    for (int h = 0; h < kHalves; h++) {
      const int here = left - h * kHalf;
      const uint32_t m_codes = read_codes(p.codes[0] + start + h * kHalf, here, at_once);
      const uint32_t v_codes = read_codes(p.codes[1] + start + h * kHalf, here, at_once);
      float w[4], g[4];
      read_four(param + h * kHalf, here, at_once, w);
      read_four(grad + h * kHalf, here, at_once, g);
      for (int j = 0; j < 4; j++) {
        const bool exists = j < here;  // the code of no number is not that of 0
        const float m_before = exists ? multiply(tables[0].levels[m_codes >> 8 * j & 255], absmax[0]) : 0;
        const float v_before = exists ? multiply(tables[1].levels[v_codes >> 8 * j & 255], absmax[1]) : 0;
        m[h][j] = multiply(m_before, p.f.beta1) + multiply(g[j], p.f.rest1);
        v[h][j] = multiply(v_before, p.f.beta2) + multiply(multiply(g[j], p.f.rest2), g[j]);
        const float root = multiply(square_root(v[h][j]), p.f.unbias) + p.f.eps;
        w[j] = multiply(w[j], p.f.decay) - multiply(m[h][j] / root, p.f.size);
      }
      write_four(param + h * kHalf, here, at_once, w);
    }
    MEMLM_SYNC_WARP();  // all lanes have read the magnitudes
    encode<true>(m, p.bounds[0], tables[0].rounding, p.codes[0] + start, p.absmax[0] + block, left, at_once);
    encode<false>(v, p.bounds[1], tables[1].rounding, p.codes[1] + start, p.absmax[1] + block, left, at_once);
  }
}

}  // namespace
}  // namespace memlm::cuda

using namespace memlm;
using namespace memlm::cuda;

memlm_status memlm_cuda_adamw_8bit(const memlm_adamw_8bit_args* args, memlm_cuda_queue* queue) {
  MEMLM_CHECK(args, "args: NULL");
  const memlm_adamw_8bit_args& a = *args;
  MEMLM_CHECK(a.count >= 0, "count: got %lld, at least 0 is needed", static_cast<long long>(a.count));
  MEMLM_CHECK(
      !a.count || (a.param && a.grad && a.exp_avg && a.exp_avg_absmax && a.exp_avg_sq && a.exp_avg_sq_absmax),
      "param, grad, exp_avg, exp_avg_sq or one of their magnitudes: NULL");
  const char* const wrong = wrong_hyperparameter(a);
  MEMLM_CHECK(!wrong, "%s: accepted are finite numbers from 0 on, betas below 1, steps from 1", wrong);
  MEMLM_PASS(check_arrays(a.dtype, "param, grad", {a.param, a.grad}));
  MEMLM_PASS(
      check_arrays(MEMLM_F32, "exp_avg_absmax, exp_avg_sq_absmax", {a.exp_avg_absmax, a.exp_avg_sq_absmax}));
  Gpu gpu;
  MEMLM_PASS(find_gpu(MEMLM_F16, &gpu));
  if (!a.count) return MEMLM_OK;

  Step p = {};
  p.count = a.count;
  p.blocks = ceil_div(a.count, kMomentBlock);
  p.param = a.param;
  p.grad = a.grad;
  p.codes[0] = a.exp_avg;
  p.codes[1] = a.exp_avg_sq;
  p.absmax[0] = a.exp_avg_absmax;
  p.absmax[1] = a.exp_avg_sq_absmax;
  p.aligned = is_aligned(a.exp_avg, 4) && is_aligned(a.exp_avg_sq, 4);
  for (const void* array : {static_cast<const void*>(a.param), a.grad}) {
    p.aligned = p.aligned && is_aligned(array, 4 * bytes_of(a.dtype));
  }
  p.f = adamw_factors(a);
  for (int t = 0; t < 2; t++) {
    const DynamicCodes& codes = t == 0 ? kSignedCodes : kUnsignedCodes;
    p.tables[t] = tables_of(codes);
    for (int b = 0; b < kBounds; b++) p.bounds[t][b] = codes.bounds[b];
  }
  void (*const kernel)(Step) = a.dtype == MEMLM_F32   ? &adamw_8bit_kernel<float>
                               : a.dtype == MEMLM_F16 ? &adamw_8bit_kernel<f16>
                                                      : &adamw_8bit_kernel<bf16>;
  const int64_t wanted = ceil_div(p.blocks, kWarps),
                most = static_cast<int64_t>(gpu.processors) * kBlocksAProcessor;
  return started(
      launch(kernel, {wanted < most ? wanted : most}, kThreads, 2 * sizeof(Tables), queue->stream, p));
}
