// All CPU kernels for one instruction set: isa/<isa>.cpp sets MEMLM_ISA to its namespace and includes
// vec_<isa>.h, then this.  Only plain C headers and templates of our own may be included from here
// on: an inline function of the standard library, compiled for AVX2, could be the copy that the
// linker keeps for every machine.
#pragma once
#include "dispatch.h"
#include "adamw_8bit-inl.h"
#include "attention-inl.h"
#include "attention_backward-inl.h"
#include "paged_attention-inl.h"
#include "dequantize-inl.h"
#include "heads-inl.h"
#include "quantize_weight-inl.h"
#include "w2_matmul-inl.h"
#include "w4_matmul-inl.h"
#include "sparse_rows-inl.h"
#include "w8_matmul-inl.h"
#include "w8a8_matmul-inl.h"

namespace memlm {
namespace MEMLM_ISA {

#define MEMLM_STRING2(x) #x
#define MEMLM_STRING(x) MEMLM_STRING2(x)
#ifndef MEMLM_TILE_UNIT
constexpr int64_t kTilesFromFast = 0, kTilesFromAccurate = 0;  // never
#endif
const Kernels kernels = {MEMLM_STRING(MEMLM_ISA), kTilesFromFast, kTilesFromAccurate,
                         w2_matmul, w4_matmul, w8_matmul, w8a8_matmul, block_sparse_matmul,
                         w4_sparse_matmul, block_sparse_grad_x, block_sparse_grad_values,
                         quantize_rows,
                         rows_to_f32, turn_heads,
                         dequantize_rows, sparse_rows, largest_bits, quantize_weight, attention,
                         attention_backward, kv_append, paged_attention, adamw_8bit};
#undef MEMLM_STRING
#undef MEMLM_STRING2

}  // namespace MEMLM_ISA
}  // namespace memlm
