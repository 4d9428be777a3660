// y = x W^T + bias over 8-bit weights and int8 activations.
#pragma once
#include "w8_matmul-inl.h"

namespace memlm {
namespace MEMLM_ISA {

inline memlm_status w8a8_matmul(const memlm_packed& w, const memlm_matmul_args& args,
                                const float* x_scales, int64_t x_group) {
  const Input in = {args, x_scales, x_group};
  if (w.group || x_group) return matmul<Fast<W8>>(W8(), w, in);
#ifdef MEMLM_TILE_UNIT
  if (args.m >= kTileUnitRows) return matmul<PerRowTiles<W8>>(W8(), w, in);
#endif
  return matmul<PerRow<W8>>(W8(), w, in);
}

// x as int8: codes [m, k], scales [m] or [m, groups].
inline memlm_status quantize_rows(const memlm_matmul_args& args, int64_t k, int64_t x_group,
                                  int8_t* codes, float* scales) {
  const Input in = {args, nullptr, x_group};
  const int64_t padded = padded_k(k, 0), groups = in.x_group ? padded / kActGroup : 1;
  const Buffer buffers(in.args.threads * padded * 4);
  if (!buffers.p) return MEMLM_NO_MEMORY;
  parallel_for(in.args.m, div_up(in.args.m, in.args.threads * kPiecesPerThread), in.args.threads,
               [&](int64_t begin, int64_t end, int slot) {
    float* buffer = static_cast<float*>(buffers.p) + slot * padded;
    for (int64_t row = begin; row < end; ++row)
      quantize_row(in, row, k, padded, buffer, [&](int64_t i, const int8_t* q, float scale, int32_t) {
        memcpy(codes + row * k + i, q, k - i < kActGroup ? k - i : kActGroup);
        scales[row * groups + (in.x_group ? i / kActGroup : 0)] = scale;
      });
  });
  return MEMLM_OK;
}

}  // namespace MEMLM_ISA
}  // namespace memlm
