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

memlm_status describe(const memlm_packed* w, int bits, const memlm_matmul_args* args, WeightOnly* p) {
  if (w->levels) {
    for (int i = 0; i < 16; i++) {
      const float level = fabsf(w->levels[i]);
      MEMLM_CHECK(level == 0 || (level >= 0x1p-14f && level <= 1), "w: its levels must be 0 or 2^-14 to 1");
    }
    p->levels = levels_of(w->levels, args->dtype);
  }
  describe_product(w, args, p);
  const int64_t k = padded_k(w), group = w->group ? w->group : k;
  p->codes = static_cast<const uint8_t*>(w->codes);
  p->scales = static_cast<const uint8_t*>(w->scales);
  p->offsets = static_cast<const uint8_t*>(w->offsets);
  p->scale_bytes = w->scale_dtype == MEMLM_F16 ? 2 : 4;
  p->zero = w->offsets || bits == 8 ? 0 : bits == 4 ? 8 : 1;
  p->k = static_cast<int>(w->k);
  p->groups = static_cast<int>(k / group);
  p->group_shift = w->group ? shift_of_group(w->group) : 31;  // 31: one group
  p->x = args->x;
  p->x_stride = args->x_stride;
  return MEMLM_OK;
}

memlm_status begin(const memlm_matmul_args* args, const Plan& plan, memlm_cuda_queue* queue, WeightOnly* p) {
  // Workspace: the product's, then x made ready.
  const int64_t before = plan.counter_bytes + plan.sum_bytes;
  const bool ready = are_ready(args, p->k);
  MEMLM_PASS(need(queue, before + (ready ? 0 : args->m * ready_stride(p->k) * 2)));
  char* const workspace = static_cast<char*>(queue->workspace);
  MEMLM_PASS(begin_product(workspace, plan, p));
  if (ready) return MEMLM_OK;
  p->x = workspace + before;
  p->x_stride = ready_stride(p->k);
  return ready_rows(args, p->k, workspace + before, queue->stream);
}

memlm_status weight_only(const memlm_packed* w, int bits, const memlm_matmul_args* args,
                         memlm_cuda_queue* queue, const Launchers& launchers) {
  MEMLM_PASS(check_packed(w, bits));
  MEMLM_PASS(check_matmul(w, args));
  Gpu gpu;
  MEMLM_PASS(find_gpu(args->dtype, &gpu));
  WeightOnly p = {};
  MEMLM_PASS(describe(w, bits, args, &p));
  if (!args->m) return MEMLM_OK;
  Plan plan;
  MEMLM_PASS(plan_product(w, args, gpu, queue->stream, &p, &plan));
  MEMLM_PASS(begin(args, plan, queue, &p));
  return (args->dtype == MEMLM_F16 ? launchers.of_f16 : launchers.of_bf16)(p, plan);
}

}  // namespace memlm::cuda
