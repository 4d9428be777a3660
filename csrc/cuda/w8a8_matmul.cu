// y = x W^T over 8-bit weights and int8 x: products of int8 tensor cores, int32 sums.
//
// W is the A operand, 8 tokens are the columns of B, and a lane's pieces of the canonical layout, 4 rows x 4
// k in 16 bytes, are what m16n8k32 takes as they are: of a step of 32 k, lane (g, c) has rows
// 4 (g % 4) .. + 3 of tile g / 4, and 8 k from 8 c on, in two pieces.  The first two rows are rows g and
// g + 8 of one operand, the last two of another; k 8c .. 8c + 3 stand where the product has its 4c .. 4c + 3,
// and 8c + 4 .. 8c + 7 where it has 16 + 4c .. 16 + 4c + 3, in W and in x.
//
//            k 0 ... 3 | 4 ... 7 | 8 ... 11 | ... | 28 ... 31
//   rows  0-3   lane 0 | lane 0  | lane 1   | ... | lane 3
//         4-7        4 |      4  |      5   | ... |      7
//         ...                                               (the second tile: lanes 16 to 31)
//
// With one scale per row of W and of x all of k is one exact integer sum, at most 65,536 x 128 x 128 = 2^30;
// it is rounded to f32 once and multiplied by the product of both scales.  Otherwise the sums of 32 k, below
// 2^20, are exact, are multiplied by those scales that change along k, and are added up in f32.
//
//   stage of the pipeline, 64 k:  [warp][codes | scales]  [slice][x: tokens x 64 | its scales: 2 x tokens]
#include "w8a8_matmul.h"

#include <type_traits>

#include "quantize_rows.h"

namespace memlm::cuda {
namespace {

constexpr int kBits = 8;
using Codes = DenseCodes<kBits>;

// As for weight_only.h, whose stages are a little larger.
constexpr int stages_of(int arch) { return arch < 800 ? 2 : 3; }

constexpr int kWarpBytes = Codes::kBytes + kStageSteps * kPair * 4;  // scales: f32, a group for each step
constexpr int kXRow = kStageK;
constexpr int x_bytes(int token_tiles) { return token_tiles * kTokenTile * (kXRow + kStageSteps * 4); }
constexpr int stage_bytes(int token_tiles) {
  return kWarps * kWarpBytes + slices_of(token_tiles) * x_bytes(token_tiles);
}

struct W8A8 : Product {
  const uint8_t *codes, *scales;
  int scale_bytes;          // of one
  int groups, group_shift;  // of W: 2^group_shift steps of k in a group; negative: a scale for each row
  const int8_t* x;
  int k, x_steps;          // of x
  int64_t x_stride;        // a multiple of 16, as x is aligned
  const float* x_scales;   // [m]; or with x_scale_stride [x_steps, x_scale_stride], 16-byte aligned
  int64_t x_scale_stride;  // 0: a scale for each row
  memlm_dtype dtype;
};

// The bits of 1.5 * 2^23, and an integer below 2^22 in magnitude added to them, are that number and the
// integer, as a float: a sum that begins so needs no conversion, which is slow.
constexpr int kMagic = 0x4b400000;
constexpr float kMagicValue = 12582912;

template <int kTokenTiles, bool whole>
__global__ void __launch_bounds__(kThreads, 2) w8a8_kernel(const W8A8 p) {
  using Here = Place<kTokenTiles>;
  constexpr int kRows = Here::kRows, kTokens = Here::kTokens, kStages = stages_of(kArch);
  constexpr int kStageBytes = stage_bytes(kTokenTiles);

  uint8_t* const memory = shared<uint8_t>();
  const Here here(p);
  const int row = here.row, g = here.g, c = here.c, token0 = here.token0;
  const int x_place = kWarps * kWarpBytes + here.slice * x_bytes(kTokenTiles);

  Codes codes(p.codes, p.steps, here);
  // Scales: a tile has 16 for a group, which are 2 or 4 pieces; a stage has 1 or 2 groups, so that a lane
  // brings at most one piece.
  const int scale_pieces = p.scale_bytes, stage_groups = p.group_shift < 0 ? 0
                                                         : p.group_shift   ? 1
                                                                           : kStageSteps;
  const int scale_tile = tile_of(p, here.at, lane() / scale_pieces % 2),
            later_group = lane() / (2 * scale_pieces);
  const bool brings_scales = later_group < stage_groups && scale_tile < p.tiles;
  const int64_t scales_begin =
      (static_cast<int64_t>(scale_tile) * p.groups * scale_pieces + lane() % scale_pieces) * 16;
  // x: 4 pieces a token, halves exchanged for two tokens of four, so that 16 lanes that read 8 bytes each, of
  // four tokens, meet all banks.  A thread brings at most one, and one of the scales: those of 4 tokens.
  constexpr int kQuarters = kTokens / 4;
  static_assert(kTokens * 4 <= kRows * kWarp && kStageSteps * kQuarters <= kRows * kWarp);
  const int in_slice = row * kWarp + lane(), x_token = in_slice / 4, x_piece = in_slice % 4;

  auto begin_copies = [&](int stage) {
    uint8_t* const to = memory + stage % kStages * kStageBytes;
    uint8_t* const weights = to + warp() * kWarpBytes;
    const int step0 = (here.first + stage) * kStageSteps;
    const bool valid = here.first + stage < here.last;
    codes.begin_copies(weights, step0, valid);
    if (!whole && later_group < stage_groups) {
      const int group = (step0 >> p.group_shift) + later_group;
      const bool there = valid && brings_scales && group < p.groups;
      const int64_t offset = scales_begin + static_cast<int64_t>(group) * (scale_pieces * 16);
      copy_async(weights + Codes::kBytes + lane() * 16, p.scales + offset, there);
    }
    uint8_t* const x = to + x_place;
    if (in_slice < kTokens * 4) {
      // The address is computed each time: kept, its registers are too many where tokens are.
      const int k = step0 * kStep + x_piece * 16;
      const bool there = valid && token0 + x_token < p.m && k < p.k;
      copy_async(x + x_token * kXRow + (x_piece ^ x_token / 2 % 2 * 2) * 16,
                 p.x + (token0 + x_token) * p.x_stride + k, there);
    }
    if (!whole && p.x_scale_stride && in_slice < kStageSteps * kQuarters) {
      const int step = step0 + in_slice / kQuarters, token = token0 + in_slice % kQuarters * 4;
      const bool there = valid && step < p.x_steps && token < p.m;
      copy_async(x + kTokens * kXRow + in_slice * 16,
                 p.x_scales + (step * p.x_scale_stride + token), there);
    }
    commit_copies();
  };

  std::conditional_t<whole, int, float> sums[kTokenTiles][2][4] = {};

#pragma unroll
  for (int i = 0; i < kStages - 1; i++) begin_copies(i);
  for (int stage = 0; stage < here.count; stage++) {
    wait_copies<kStages - 2>();
    MEMLM_SYNC_THREADS();  // this stage is there for all, and the one before is read
    begin_copies(stage + kStages - 1);
    const uint8_t* const from = memory + stage % kStages * kStageBytes;
    const uint8_t* const weights = from + warp() * kWarpBytes;
    const uint8_t* const x = from + x_place;
    // Both steps at once would need more registers than there are where tokens are many.
#pragma unroll(kTokenTiles == 8 && !whole ? 1 : kStageSteps)
    for (int s = 0; s < kStageSteps; s++) {
      Vec4 q[Codes::kPieces];
      codes.read(weights, s, q);
      const uint32_t a[2][4] = {{q[0].x, q[0].y, q[1].x, q[1].y}, {q[0].z, q[0].w, q[1].z, q[1].w}};
      float scales[4] = {1, 1, 1, 1};
      if (!whole && p.group_shift >= 0) {
        const int slot = p.group_shift ? 0 : s;
        load_scales(weights + Codes::kBytes + (slot * kPair + g * 4) * p.scale_bytes, p.scale_bytes, scales);
      }
#pragma unroll
      for (int t = 0; t < kTokenTiles; t++) {
        const int token = t * kTokenTile + g;
        const Vec2 xs = load<Vec2>(x + token * kXRow + (s ^ token / 2 % 2) * 32 + c * 8);
        const uint32_t b[2] = {xs.x, xs.y};
        if constexpr (whole) {
          mma_int8(sums[t][0], a[0], b);
          mma_int8(sums[t][1], a[1], b);
        } else {
          float x_scales[2] = {1, 1};
          if (p.x_scale_stride) {
            const Vec2 both = load<Vec2>(x + kTokens * kXRow + (s * kTokens + t * kTokenTile + 2 * c) * 4);
            x_scales[0] = as_float(both.x), x_scales[1] = as_float(both.y);
          }
#pragma unroll
          for (int h = 0; h < 2; h++) {
            int product[4] = {kMagic, kMagic, kMagic, kMagic};
            mma_int8(product, a[h], b);
#pragma unroll
            for (int i = 0; i < 4; i++) {
              const float sum = as_float(static_cast<uint32_t>(product[i])) - kMagicValue;
              sums[t][h][i] += sum * (scales[2 * h + i / 2] * x_scales[i % 2]);
            }
          }
        }
      }
    }
  }
  wait_copies<0>();
  MEMLM_SYNC_THREADS();

  if (!add_up<rows_of(kTokenTiles)>(p, sums)) return;

  float scales[4] = {1, 1, 1, 1};  // of whole rows
  if (p.group_shift < 0 && here.have) {
    load_scales(p.scales + (here.mine * int64_t{kTile} + g % 4 * 4) * p.scale_bytes, p.scale_bytes, scales);
  }
  finish(p, here, AnyElements{p.dtype}, [&](int t, int r, int j) {
    const int token = token0 + t * kTokenTile + 2 * c + j;
    const float x_scale = !p.x_scale_stride && token < p.m ? p.x_scales[token] : 1;
    return static_cast<float>(sums[t][r / 2][r % 2 * 2 + j]) * (scales[r] * x_scale);
  });
}

// ---- int8 x made ready: rows a multiple of 16 bytes apart, scales of a step beside each other ----

constexpr int kReadyThreads = 256;

// A block for each row; each of the two where it is given.
__global__ void ready_codes_kernel(const int8_t* x, int64_t x_stride, int k, int8_t* codes, int64_t stride,
                                   const float* scales, int steps, float* by_step, int64_t step_stride) {
  const int64_t row = block_x();
  for (int i = thread(); codes && i < stride; i += kReadyThreads) {
    codes[row * stride + i] = i < k ? x[row * x_stride + i] : 0;
  }
  for (int i = thread(); by_step && i < steps; i += kReadyThreads) {
    by_step[i * step_stride + row] = scales[row * steps + i];
  }
}

template <bool whole>
memlm_status launch_w8a8(const W8A8& p, const Plan& plan) {
  const int tokens = plan.token_tiles;
  void (*kernel)(W8A8) = tokens == 1   ? &w8a8_kernel<1, whole>
                         : tokens == 2 ? &w8a8_kernel<2, whole>
                         : tokens == 4 ? &w8a8_kernel<4, whole>
                                       : &w8a8_kernel<8, whole>;
  const int bytes = stages_of(plan.gpu.arch) * stage_bytes(tokens);
  return started(launch(kernel, plan.grid, kThreads, bytes, plan.stream, p));
}

// The kernel's parameters but for x and what lies in the workspace.
void describe(const memlm_packed* w, const memlm_matmul_args* args, W8A8* p) {
  p->codes = static_cast<const uint8_t*>(w->codes);
  p->scales = static_cast<const uint8_t*>(w->scales);
  p->scale_bytes = w->scale_dtype == MEMLM_F16 ? 2 : 4;
  p->groups = w->group ? static_cast<int>(padded_k(w) / w->group) : 1;
  p->group_shift = w->group ? shift_of_group(w->group) : -1;
  p->dtype = args->dtype;
  p->k = static_cast<int>(w->k);
  p->x_steps = static_cast<int>(ceil_div(w->k, kStep));
}

}  // namespace

memlm_status multiply_ready(const memlm_packed* w, const memlm_matmul_args* args, const ReadyRows& x,
                            const Gpu& gpu, char* workspace, void* stream) {
  W8A8 p = {};
  Plan plan;
  MEMLM_PASS(plan_product(w, args, gpu, stream, &p, &plan));
  describe(w, args, &p);
  store_f32(&p);
  MEMLM_PASS(begin_product(workspace, plan, &p));
  p.x = x.codes;
  p.x_stride = x.stride;
  p.x_scales = x.scales;
  return w->group ? launch_w8a8<false>(p, plan) : launch_w8a8<true>(p, plan);
}

}  // namespace memlm::cuda

using namespace memlm;
using namespace memlm::cuda;

memlm_status memlm_cuda_w8a8_matmul(const memlm_packed* w, const memlm_matmul_args* args,
                                    const float* x_scales, int64_t x_group, memlm_cuda_queue* queue) {
  MEMLM_PASS(check_packed(w, kBits));
  MEMLM_CHECK(w->k <= kMostIntK, "k: got %lld, at most %lld are accepted", static_cast<long long>(w->k),
              static_cast<long long>(kMostIntK));
  MEMLM_PASS(check_matmul(w, args, x_scales != nullptr));
  MEMLM_CHECK(x_group == 0 || x_group == kStep, "x_group: got %lld, accepted are 0 and 32",
              static_cast<long long>(x_group));
  MEMLM_CHECK(!x_scales || !args->norm, "norm: got one, but x is int8, and only numbers can be normalised");
  MEMLM_PASS(check_arrays(MEMLM_F32, "x_scales", {x_scales}));
  Gpu gpu;
  MEMLM_PASS(find_gpu(MEMLM_F16, &gpu));
  if (!args->m) return MEMLM_OK;

  W8A8 p = {};
  Plan plan;
  MEMLM_PASS(plan_product(w, args, gpu, queue->stream, &p, &plan));
  describe(w, args, &p);

  // Workspace: the product's, then codes and scales of x, where they are not given as they are needed.
  const int64_t stride = round_up(w->k, 16), by_step = round_up(args->m, 4);
  const bool have_codes = x_scales && w->k % 16 == 0 && args->x_stride % 16 == 0 && is_aligned(args->x, 16);
  const bool have_scales = x_scales && !x_group;
  const int64_t before = plan.counter_bytes + plan.sum_bytes;
  const int64_t code_bytes = have_codes ? 0 : round_up(args->m * stride, 256);
  const int64_t scale_bytes = have_scales ? 0 : (x_group ? p.x_steps : 1) * by_step * 4;
  MEMLM_PASS(need(queue, before + code_bytes + scale_bytes));
  char* const workspace = static_cast<char*>(queue->workspace);
  MEMLM_PASS(begin_product(workspace, plan, &p));
  int8_t* const codes = have_codes ? nullptr : reinterpret_cast<int8_t*>(workspace + before);
  float* const scales = have_scales ? nullptr : reinterpret_cast<float*>(workspace + before + code_bytes);
  if (!x_scales) {
    MEMLM_PASS(begin_quantize_rows(args->m, w->k, args->x, args->x_stride, args->dtype, args->norm,
                                   args->norm_eps, x_group, {codes, stride, scales, 1, by_step},
                                   queue->stream));
  } else if (codes || scales) {
    MEMLM_PASS(started(launch(&ready_codes_kernel, {args->m}, kReadyThreads, 0, queue->stream,
                              static_cast<const int8_t*>(args->x), args->x_stride, w->k, codes, stride,
                              x_scales, p.x_steps, scales, by_step)));
  }
  p.x = codes ? codes : static_cast<const int8_t*>(args->x);
  p.x_stride = codes ? stride : args->x_stride;
  p.x_scales = scales ? scales : x_scales;
  p.x_scale_stride = x_group ? by_step : 0;
  return x_group || w->group ? launch_w8a8<false>(p, plan) : launch_w8a8<true>(p, plan);
}
