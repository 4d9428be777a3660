// What the launchers share: errors, workspaces, checks of matrices.
#ifndef MEMLM_CUDA_HOST_H_
#define MEMLM_CUDA_HOST_H_

#include <initializer_list>

#include "../include/memlm_cuda.h"
#include "device.h"

namespace memlm::cuda {

// Keeps the text for memlm_cuda_last_error.
__attribute__((format(printf, 2, 3))) memlm_status fail(memlm_status status, const char* format, ...);

#define MEMLM_CHECK(condition, ...) \
  if (!(condition)) return ::memlm::cuda::fail(MEMLM_INVALID, __VA_ARGS__)
#define MEMLM_PASS(status) \
  if (const memlm_status passed = (status); passed != MEMLM_OK) return passed

// The current device, if it is supported, and supports activations of `dtype`.
memlm_status find_gpu(memlm_dtype dtype, Gpu* gpu);

// Whether the queue has so many bytes; if not, what memlm_cuda_queue says of that.
memlm_status need(memlm_cuda_queue* queue, int64_t bytes);

// Of a launch.
inline memlm_status started(bool ok) {
  return ok ? MEMLM_OK : fail(MEMLM_UNSUPPORTED, "the kernel could not be launched");
}

// A dense packed matrix of so many bits.
memlm_status check_packed(const memlm_packed* w, int bits);

// What holds of packed matrices of any pattern.
memlm_status check_values(const memlm_packed* w, int bits);

// The arguments of a product with W[n, k].  x holds numbers, or int8.
memlm_status check_matmul(const memlm_packed* w, const memlm_matmul_args* args, bool int8_x = false);

inline int bytes_of(memlm_dtype dtype) { return dtype == MEMLM_F32 ? 4 : 2; }

// Arrays of dtype, given in the order of their names.
memlm_status check_arrays(memlm_dtype dtype, const char* names, std::initializer_list<const void*> arrays);

// Rows of W that are asked for as floats of dtype, at `out`.
memlm_status check_rows_of(const memlm_packed* w, int64_t row, int64_t rows, memlm_dtype dtype,
                           const void* out);

inline bool is_aligned(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// k as it is padded in a packed matrix of numbers.
inline int64_t padded_k(const memlm_packed* w) {
  constexpr int64_t activation_group = 32;
  return round_up(w->k, w->group > activation_group ? w->group : activation_group);
}

}  // namespace memlm::cuda

#endif
