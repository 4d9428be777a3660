#include "product.h"

namespace memlm::cuda {

void describe_product(const memlm_packed* w, const memlm_matmul_args* args, Product* p) {
  p->n = static_cast<int>(w->n);
  p->m = static_cast<int>(args->m);
  p->tiles = static_cast<int>(ceil_div(w->n, kTile));
  p->steps = static_cast<int>(padded_k(w) / kStep);
  p->bias = args->bias;
  p->residual = args->residual;
  p->y = args->y;
  p->y_stride = args->y_stride;
  p->residual_stride = args->residual_stride;
  p->swiglu = args->swiglu != 0;
  p->wide = args->y_stride % 4 == 0 && is_aligned(args->y, 4 * bytes_of(args->dtype));
}

memlm_status plan_blocks(const memlm_matmul_args* args, int token_tiles, int64_t row_blocks,
                         int64_t most_splits, int64_t sums, const Gpu& gpu, void* stream, Plan* plan) {
  constexpr int64_t most_blocks = 65535;
  const int64_t tokens = token_tiles * kTokenTile, token_blocks = ceil_div(args->m, tokens);
  MEMLM_CHECK(token_blocks <= most_blocks, "m: got %lld, at most %lld are accepted",
              static_cast<long long>(args->m), static_cast<long long>(most_blocks * tokens));
  const int64_t blocks = row_blocks * token_blocks;
  // As many as fill two for each multiprocessor; none where three of four have a block: sharing out k costs a
  // counter that is cleared and two waits for memory, on an H200 a third of 10 us.
  const int64_t wanted = 4 * blocks >= 3 * gpu.processors ? 1 : 2 * gpu.processors / blocks;
  const int64_t some = wanted < most_splits ? wanted : most_splits;
  const int64_t splits = some < 1 ? 1 : some;
  *plan = {token_tiles, {row_blocks, splits, token_blocks}, gpu, stream, 0, 0};
  if (splits > 1) {
    plan->counter_bytes = round_up(blocks * 4, 256);
    plan->sum_bytes = round_up(splits * blocks * sums * 4, 256);
  }
  return MEMLM_OK;
}

memlm_status plan_product(const memlm_packed* w, const memlm_matmul_args* args, const Gpu& gpu, void* stream,
                          Product* p, Plan* plan) {
  describe_product(w, args, p);
  const int token_tiles = args->m <= 8    ? 1
                          : args->m <= 16 ? 2
                          : args->m <= 32 ? 4
                                          : 8,
            rows = rows_of(token_tiles);
  const int64_t pairs = p->swiglu ? p->tiles / 2 : ceil_div(p->tiles, 2);
  // While each slice of each block still has a pipeline's worth of stages.
  constexpr int64_t least = 4;
  const int64_t most_splits = ceil_div(p->steps, kStageSteps) / (least * slices_of(token_tiles));
  return plan_blocks(args, token_tiles, ceil_div(pairs, rows), most_splits, token_tiles * 8 * rows * kWarp,
                     gpu, stream, plan);
}

void store_f32(Product* p) {
  p->f32_y = true;
  p->wide = p->y_stride % 4 == 0 && is_aligned(p->y, 16);
}

memlm_status begin_product(char* workspace, const Plan& plan, Product* p) {
  if (!plan.counter_bytes) return MEMLM_OK;
  p->counters = reinterpret_cast<int*>(workspace);
  p->partial = workspace + plan.counter_bytes;
  return started(clear(p->counters, plan.counter_bytes, plan.stream));
}

}  // namespace memlm::cuda
