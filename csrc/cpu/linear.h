// Linear layers of any format and mode, for what is made of several of them.
#pragma once
#include "../formats.h"
#include "../include/memlm.h"
#include "dispatch.h"

namespace memlm {

inline memlm_status check_linear(const memlm_linear& linear) {
  if (memlm_status s = check_weight(&linear.w, linear.bits)) return s;
  const bool dense8 = linear.bits == 8 && linear.w.pattern == MEMLM_DENSE;
  if (linear.mode < MEMLM_ACCURATE || linear.mode > MEMLM_W8A8 ||
      (linear.mode == MEMLM_W8A8 && !dense8))
    return fail(MEMLM_INVALID, "mode: got %d for %d bits, accepted are 0, 1, and for dense 8 bits 2",
                linear.mode, linear.bits);
  return MEMLM_OK;
}

// args but for bias and fast, which are linear's.
inline memlm_status multiply(const memlm_linear& linear, memlm_matmul_args args) {
  args.bias = linear.bias;
  args.fast = linear.mode == MEMLM_FAST;
  if (linear.w.pattern == MEMLM_BLOCKS)
    return memlm_block_sparse_matmul(&linear.w, linear.bits, &args);
  if (linear.w.pattern != MEMLM_DENSE) return memlm_w4_sparse_matmul(&linear.w, &args);
  if (linear.mode == MEMLM_W8A8) return memlm_w8a8_matmul(&linear.w, &args, nullptr, 0);
  if (linear.bits == 2) return memlm_w2_matmul(&linear.w, &args);
  if (linear.bits == 4) return memlm_w4_matmul(&linear.w, &args);
  return memlm_w8_matmul(&linear.w, &args);
}

// Tiles first .. end - 1 of linear, without a bias: a linear layer of its own.
inline memlm_linear tiles_of(const memlm_linear& linear, int64_t first, int64_t end) {
  memlm_linear part = linear;
  memlm_packed& w = part.w;
  const int64_t padded = padded_k(w.k, w.group), groups = w.group ? padded / w.group : 1;
  const int64_t scales = first * groups * kTileRows * (w.scale_dtype == MEMLM_F32 ? 4 : 2);
  if (w.pattern == MEMLM_BLOCKS || w.pattern == MEMLM_UNSTRUCTURED) {
    w.starts += first;  // which say where codes are
  } else {
    const int bits = w.pattern == MEMLM_TWO_OF_FOUR ? linear.bits / 2 : linear.bits;
    w.codes = static_cast<const char*>(w.codes) + first * tile_bytes(bits, padded);
  }
  if (w.pattern != MEMLM_BLOCKS) {  // whose scales and offsets go with the blocks
    w.scales = static_cast<const char*>(w.scales) + scales;
    if (w.offsets) w.offsets = static_cast<const char*>(w.offsets) + scales;
    if (w.places)
      w.places = static_cast<const char*>(w.places) + first * padded / kLaneK * kPlaceBytes;
  }
  w.n = (end * kTileRows < w.n ? end * kTileRows : w.n) - first * kTileRows;
  part.bias = nullptr;
  return part;
}

}  // namespace memlm
