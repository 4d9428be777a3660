#include "dequantize.h"

memlm_status memlm_cuda_embedding(const memlm_packed* w, int bits, const int64_t* ids, int64_t count,
                                  memlm_dtype dtype, void* out, memlm_cuda_queue* queue) {
  MEMLM_CHECK(count >= 0 && (!count || ids) && memlm::cuda::is_aligned(ids, 8), "ids: got %lld at %p",
              static_cast<long long>(count), static_cast<const void*>(ids));
  MEMLM_PASS(memlm::cuda::check_arrays(dtype, "out", {out}));
  MEMLM_CHECK(!count || out, "out: NULL");
  return memlm::cuda::dequantize_rows(w, bits, ids, 0, count, dtype, out, queue);
}
