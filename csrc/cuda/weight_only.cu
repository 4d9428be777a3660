#include "weight_only.h"

#include <math.h>
#include <string.h>

#include "rows.h"

namespace memlm::cuda {
namespace {

// A 16-bit float of the host.
uint16_t rounded(float value, memlm_dtype dtype) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if (dtype == MEMLM_BF16) return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  // Levels are at most 1, and none is so small that f16 has no normal number for it, but 0.
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (!magnitude) return static_cast<uint16_t>(sign);
  const uint32_t even = magnitude + 0xfff + (magnitude >> 13 & 1);
  return static_cast<uint16_t>(sign | ((even >> 13) - ((127 - 15) << 10)));
}

Levels levels_of(const float* levels, memlm_dtype dtype) {
  Levels table = {};
  for (int i = 0; i < 16; i++) {
    const uint32_t bits = rounded(levels[i], dtype);
    table.low[i / 4] |= (bits & 0xff) << i % 4 * 8;
    table.high[i / 4] |= bits >> 8 << i % 4 * 8;
  }
  return table;
}

}  // namespace

int64_t splits_of(int64_t blocks, int64_t most, const Gpu& gpu) {
  const int64_t wanted = 2 * gpu.processors / blocks, splits = wanted < most ? wanted : most;
  return splits < 1 ? 1 : splits;
}

memlm_status describe(const memlm_packed* w, int bits, const memlm_matmul_args* args, WeightOnly* parameters) {
  if (w->levels) {
    for (int i = 0; i < 16; i++) {
      const float level = fabsf(w->levels[i]);
      MEMLM_CHECK(level == 0 || (level >= 0x1p-14f && level <= 1), "w: its levels must be 0 or 2^-14 to 1");
    }
  }
  WeightOnly& p = *parameters;
  const int64_t k = padded_k(w), group = w->group ? w->group : k;
  p.codes = static_cast<const uint8_t*>(w->codes);
  p.scales = static_cast<const uint8_t*>(w->scales);
  p.offsets = static_cast<const uint8_t*>(w->offsets);
  p.scale_bytes = w->scale_dtype == MEMLM_F16 ? 2 : 4;
  if (w->levels) p.levels = levels_of(w->levels, args->dtype);
  p.zero = w->offsets || bits == 8 ? 0 : bits == 4 ? 8 : 1;
  p.n = static_cast<int>(w->n);
  p.k = static_cast<int>(w->k);
  p.tiles = static_cast<int>(ceil_div(w->n, kTile));
  p.steps = static_cast<int>(k / kStep);
  p.groups = static_cast<int>(k / group);
  p.group_shift = 31;  // one group
  for (int shift = 0; shift < 3 && w->group; shift++) {
    if (group == kStep << shift) p.group_shift = shift;
  }
  p.code_stride = p.steps * bits * 64;
  p.x = args->x;
  p.x_stride = args->x_stride;
  p.m = static_cast<int>(args->m);
  p.bias = args->bias;
  p.residual = args->residual;
  p.y = args->y;
  p.y_stride = args->y_stride;
  p.residual_stride = args->residual_stride;
  p.swiglu = args->swiglu != 0;
  p.wide = args->y_stride % 4 == 0 && is_aligned(args->y, 8);
  return MEMLM_OK;
}

memlm_status prepare(const memlm_matmul_args* args, int64_t splits, int64_t blocks, int64_t sums,
                     memlm_cuda_queue* queue, WeightOnly* parameters) {
  WeightOnly& p = *parameters;
  // Workspace: counters, the blocks' sums, x made ready.
  const int64_t counters = splits > 1 ? round_up(blocks * 4, 256) : 0;
  const int64_t partial = splits > 1 ? round_up(splits * blocks * sums * 4, 256) : 0;
  const bool ready = are_ready(args, p.k);
  MEMLM_PASS(need(queue, counters + partial + (ready ? 0 : args->m * ready_stride(p.k) * 2)));
  char* const workspace = static_cast<char*>(queue->workspace);
  if (splits > 1) {
    p.counters = reinterpret_cast<int*>(workspace);
    p.partial = reinterpret_cast<float*>(workspace + counters);
    MEMLM_PASS(started(clear(p.counters, counters, queue->stream)));
  }
  if (!ready) {
    char* const to = workspace + counters + partial;
    MEMLM_PASS(ready_rows(args, p.k, to, queue->stream));
    p.x = to;
    p.x_stride = ready_stride(p.k);
  }
  return MEMLM_OK;
}

memlm_status make_plan(const memlm_matmul_args* args, const Gpu& gpu, memlm_cuda_queue* queue, WeightOnly* p,
                       Plan* plan) {
  const int token_tiles = args->m <= 8 ? 1 : args->m <= 16 ? 2 : args->m <= 32 ? 4 : 8;
  const int rows = rows_of(token_tiles);
  const int64_t pairs = p->swiglu ? p->tiles / 2 : ceil_div(p->tiles, 2);
  const int64_t token_blocks = ceil_div(args->m, token_tiles * kTokenTile);
  MEMLM_CHECK(token_blocks <= 65535, "m: got %lld, at most %d are accepted", static_cast<long long>(args->m),
              65535 * 64);
  const int64_t blocks = ceil_div(pairs, rows) * token_blocks;
  // While each slice of each block still has a pipeline's worth of stages.
  const int64_t most = ceil_div(p->steps, kStageSteps) / (4 * (kWarps / rows));
  *plan = {token_tiles, splits_of(blocks, most, gpu), gpu, queue->stream};
  return prepare(args, plan->splits, blocks, token_tiles * 8 * rows * kWarp, queue, p);
}

memlm_status weight_only(const memlm_packed* w, int bits, const memlm_matmul_args* args, memlm_cuda_queue* queue,
                         const Launchers& launchers) {
  MEMLM_PASS(check_packed(w, bits));
  MEMLM_PASS(check_matmul(w, args));
  Gpu gpu;
  MEMLM_PASS(find_gpu(args->dtype, &gpu));
  WeightOnly p = {};
  MEMLM_PASS(describe(w, bits, args, &p));
  if (!args->m) return MEMLM_OK;
  Plan plan;
  MEMLM_PASS(make_plan(args, gpu, queue, &p, &plan));
  return (args->dtype == MEMLM_F16 ? launchers.of_f16 : launchers.of_bf16)(p, plan);
}

}  // namespace memlm::cuda
