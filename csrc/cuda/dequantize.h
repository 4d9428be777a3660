// Rows of a packed W as floats: for dequantize, and for embedding, which picks rows by index.
#ifndef MEMLM_CUDA_DEQUANTIZE_H_
#define MEMLM_CUDA_DEQUANTIZE_H_

#include "host.h"

namespace memlm::cuda {

// out [count, k]: row ids[i], or where ids is NULL row + i, of a dense W.  A row for an id outside of W is
// NaN.  row, count, dtype and out have been checked, other arguments have not.
memlm_status dequantize_rows(const memlm_packed* w, int bits, const int64_t* ids, int64_t row, int64_t count,
                             memlm_dtype dtype, void* out, memlm_cuda_queue* queue);

}  // namespace memlm::cuda

#endif
