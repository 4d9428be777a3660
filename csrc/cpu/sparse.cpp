// The C ABI of sparse matrices: checks, and calls of the kernels.
#include "../formats.h"
#include "dispatch.h"
#include "threads.h"

namespace memlm {
namespace {

// That every block lies in the matrix, before any is read.
memlm_status check_blocks(const memlm_packed& w) {
  const int64_t tiles = div_up(w.n, kTileRows), runs = div_up(w.k, kActGroup);
  const int32_t* places = static_cast<const int32_t*>(w.places);
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t begin = w.starts[t], end = w.starts[t + 1];
    if (begin == end) continue;
    bool bad = places[begin] < 0 || places[end - 1] >= runs;
    for (int64_t b = begin + 1; b < end; ++b) bad |= places[b - 1] >= places[b];
    if (bad)
      return fail(MEMLM_INVALID, "places: of tile %lld do not ascend within 0 to %lld", (long long)t,
                  (long long)runs - 1);
  }
  return MEMLM_OK;
}

memlm_status check_starts(const memlm_packed& w, int64_t most) {
  const int64_t tiles = div_up(w.n, kTileRows);
  if (!w.starts) return fail(MEMLM_INVALID, "starts: is NULL");
  for (int64_t t = 0; t <= tiles; ++t) {
    const int64_t before = t ? w.starts[t - 1] : 0;
    if (w.starts[t] < before || (t && w.starts[t] - before > most))
      return fail(MEMLM_INVALID, "starts: number %lld is %lld, after %lld; a tile holds up to %lld",
                  (long long)t, (long long)w.starts[t], (long long)before, (long long)most);
  }
  return MEMLM_OK;
}

// Multiply-adds for a row of x.
double stored_weights(const memlm_packed& w) {
  if (w.pattern != MEMLM_BLOCKS) return static_cast<double>(w.n) * w.k;
  const int64_t tiles = div_up(w.n, kTileRows);
  return static_cast<double>(w.starts[tiles] - w.starts[0]) * kTileRows * kActGroup;
}

memlm_status check_blocks_only(const memlm_packed* w, int bits) {
  if (w && w->pattern != MEMLM_BLOCKS)
    return fail(MEMLM_INVALID, "pattern: got %d, accepted is blocks (3)", w->pattern);
  return check_weight(w, bits);
}

memlm_status check_rows(int64_t m, int threads, bool null) {
  if (m < 0 || m > INT32_MAX)
    return fail(MEMLM_INVALID, "m: got %lld, accepted is 0 to 2^31-1", (long long)m);
  if (threads < 1) return fail(MEMLM_INVALID, "threads: got %d, at least 1 is needed", threads);
  if (null) return fail(MEMLM_INVALID, "grad, x or the result: is NULL");
  return MEMLM_OK;
}

}  // namespace

memlm_status check_pattern(const memlm_packed& w, int bits) {
  const int64_t padded = padded_k(w.k, w.group);
  if (w.pattern == MEMLM_BLOCKS) {
    if (w.group != kActGroup)
      return fail(MEMLM_INVALID, "group: got %lld, accepted for blocks is %d", (long long)w.group,
                  kActGroup);
    if (memlm_status s = check_starts(w, padded / kActGroup)) return s;
    if (!w.places && w.starts[0] != w.starts[div_up(w.n, kTileRows)])
      return fail(MEMLM_INVALID, "places: is NULL");
    return check_blocks(w);
  }
  if (w.pattern != MEMLM_TWO_OF_FOUR && w.pattern != MEMLM_UNSTRUCTURED)
    return fail(MEMLM_INVALID, "pattern: got %d, accepted are 0 to 3", w.pattern);
  if (bits != 4 || w.offsets)
    return fail(MEMLM_INVALID, "pattern: %d is for 4 bits without offsets", w.pattern);
  if (!w.places) return fail(MEMLM_INVALID, "places: is NULL");
  bool zero = !w.levels;
  for (int i = 0; w.levels && i < 16; ++i) zero |= w.levels[i] == 0;
  if (!zero) return fail(MEMLM_INVALID, "levels: none is 0, which weights that are not stored have");
  return w.pattern == MEMLM_UNSTRUCTURED ? check_starts(w, tile_bytes(4, padded)) : MEMLM_OK;
}

}  // namespace memlm

using namespace memlm;

memlm_status memlm_block_sparse_matmul(const memlm_packed* w, int bits, const memlm_matmul_args* args) {
  if (memlm_status s = check_blocks_only(w, bits)) return s;
  if (memlm_status s = check_matmul(*w, args)) return s;
  if (!args->m) return MEMLM_OK;
  memlm_matmul_args useful = *args;
  useful.threads = useful_threads(static_cast<double>(args->m) * stored_weights(*w), args->threads);
  return said(kernels().block_sparse_matmul(*w, bits, useful));
}

memlm_status memlm_w4_sparse_matmul(const memlm_packed* w, const memlm_matmul_args* args) {
  if (w && w->pattern != MEMLM_TWO_OF_FOUR && w->pattern != MEMLM_UNSTRUCTURED)
    return fail(MEMLM_INVALID, "pattern: got %d, accepted are 1 and 2", w->pattern);
  if (memlm_status s = check_weight(w, 4)) return s;
  if (memlm_status s = check_matmul(*w, args)) return s;
  if (!args->m) return MEMLM_OK;
  memlm_matmul_args useful = *args;
  useful.threads = useful_threads(static_cast<double>(args->m) * stored_weights(*w), args->threads);
  return said(kernels().w4_sparse_matmul(*w, useful));
}

memlm_status memlm_block_sparse_grad_x(const memlm_packed* w, int bits, int64_t m, const float* grad,
                                       float* grad_x, int threads) {
  if (memlm_status s = check_blocks_only(w, bits)) return s;
  if (memlm_status s = check_rows(m, threads, m > 0 && (!grad || !grad_x))) return s;
  return m ? said(kernels().block_sparse_grad_x(*w, bits, m, grad, grad_x, threads)) : MEMLM_OK;
}

memlm_status memlm_block_sparse_grad_values(const memlm_packed* w, int64_t m, const float* grad,
                                            const float* x, float* grad_values, int threads) {
  if (memlm_status s = check_blocks_only(w, 32)) return s;
  const bool none = stored_weights(*w) == 0;
  const bool null = !grad_values || (m > 0 && (!grad || !x));
  if (memlm_status s = check_rows(m, threads, null && !none)) return s;
  if (none) return MEMLM_OK;
  kernels().block_sparse_grad_values(*w, m, grad, x, grad_values, threads);
  return MEMLM_OK;
}
