// The C ABI of adamw_8bit: checks arguments and shares out the blocks.
#include "../adamw_8bit.h"

#include "../formats.h"
#include "dispatch.h"
#include "threads.h"

namespace memlm {
namespace {

memlm_status check(const memlm_adamw_8bit_args* args) {
  if (!args) return fail(MEMLM_INVALID, "args: is NULL");
  const memlm_adamw_8bit_args& a = *args;
  if (a.count < 0) return fail(MEMLM_INVALID, "count: got %lld, at least 0 is needed", (long long)a.count);
  if (!is_dtype(a.dtype))
    return fail(MEMLM_INVALID, "dtype: got %d, accepted are f32, f16, bf16", a.dtype);
  if (a.count && (!a.param || !a.grad || !a.exp_avg || !a.exp_avg_absmax || !a.exp_avg_sq ||
                  !a.exp_avg_sq_absmax))
    return fail(MEMLM_INVALID, "param, grad, exp_avg, exp_avg_sq or one of their magnitudes: is NULL");
  if (const char* wrong = wrong_hyperparameter(a))
    return fail(MEMLM_INVALID, "%s: accepted are finite numbers from 0 on, betas below 1, steps from 1",
                wrong);
  if (a.threads < 1) return fail(MEMLM_INVALID, "threads: got %d, at least 1 is needed", a.threads);
  return MEMLM_OK;
}

}  // namespace
}  // namespace memlm

using namespace memlm;

memlm_status memlm_adamw_8bit(const memlm_adamw_8bit_args* args) {
  if (memlm_status s = check(args)) return s;
  constexpr int64_t kBlocks = 32;  // at once: some 20 us of work
  const AdamWFactors factors = adamw_factors(*args);
  const Kernels& isa = kernels();
  const auto run = [&](int64_t begin, int64_t end, int) { isa.adamw_8bit(*args, factors, begin, end); };
  parallel_for(div_up(args->count, kMomentBlock), kBlocks, args->threads, run);
  return MEMLM_OK;
}
