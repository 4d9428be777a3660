#include "product.h"

namespace memlm::cuda {
namespace {

// How many blocks share out k: as many as fill two for each multiprocessor, while each slice of each
// still has a pipeline's worth of stages.
int64_t splits_of(int64_t blocks, int64_t stages, int slices, const Gpu& gpu) {
  constexpr int64_t least = 4;
  const int64_t wanted = 2 * gpu.processors / blocks, most = stages / (least * slices);
  const int64_t splits = wanted < most ? wanted : most;
  return splits < 1 ? 1 : splits;
}

}  // namespace

memlm_status plan_product(const memlm_packed* w, const memlm_matmul_args* args, const Gpu& gpu, void* stream,
                          Product* p, Plan* plan) {
  const int64_t tiles = ceil_div(w->n, kTile);
  p->n = static_cast<int>(w->n);
  p->m = static_cast<int>(args->m);
  p->tiles = static_cast<int>(tiles);
  p->steps = static_cast<int>(padded_k(w) / kStep);
  p->bias = args->bias;
  p->residual = args->residual;
  p->y = args->y;
  p->y_stride = args->y_stride;
  p->residual_stride = args->residual_stride;
  p->swiglu = args->swiglu != 0;
  p->wide = args->y_stride % 4 == 0 && is_aligned(args->y, 4 * bytes_of(args->dtype));

  const int token_tiles = args->m <= 8 ? 1 : args->m <= 16 ? 2 : args->m <= 32 ? 4 : 8;
  const int64_t pairs = p->swiglu ? tiles / 2 : ceil_div(tiles, 2);
  const int64_t row_blocks = ceil_div(pairs, rows_of(token_tiles));
  const int64_t token_blocks = ceil_div(args->m, token_tiles * kTokenTile);
  MEMLM_CHECK(token_blocks <= 65535, "m: got %lld, at most %d are accepted", static_cast<long long>(args->m),
              65535 * 8 * kTokenTile);
  const int64_t blocks = row_blocks * token_blocks;
  const int64_t splits = splits_of(blocks, ceil_div(p->steps, kStageSteps), slices_of(token_tiles), gpu);
  *plan = {token_tiles, {row_blocks, splits, token_blocks}, gpu, stream, 0, 0};
  if (splits > 1) {
    plan->counter_bytes = round_up(blocks * 4, 256);
    plan->sum_bytes =
        round_up(splits * blocks * token_tiles * 8 * rows_of(token_tiles) * kWarp * int64_t{4}, 256);
  }
  return MEMLM_OK;
}

memlm_status begin_product(char* workspace, const Plan& plan, Product* p) {
  if (!plan.counter_bytes) return MEMLM_OK;
  p->counters = reinterpret_cast<int*>(workspace);
  p->partial = workspace + plan.counter_bytes;
  return started(clear(p->counters, plan.counter_bytes, plan.stream));
}

}  // namespace memlm::cuda
