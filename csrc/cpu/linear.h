// Linear layers of any format and mode, for what is made of several of them.
#pragma once
#include "../formats.h"
#include "../include/memlm.h"
#include "dispatch.h"

namespace memlm {

inline memlm_status check_linear(const memlm_linear& linear) {
  if (memlm_status s = check_weight(&linear.w, linear.bits)) return s;
  if (linear.mode < MEMLM_ACCURATE || linear.mode > MEMLM_W8A8 ||
      (linear.mode == MEMLM_W8A8 && linear.bits != 8))
    return fail(MEMLM_INVALID, "mode: got %d for %d bits, accepted are 0, 1, and for 8 bits 2",
                linear.mode, linear.bits);
  return MEMLM_OK;
}

// args but for bias and fast, which are linear's.
inline memlm_status multiply(const memlm_linear& linear, memlm_matmul_args args) {
  args.bias = linear.bias;
  args.fast = linear.mode == MEMLM_FAST;
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
  w.codes = static_cast<const char*>(w.codes) + first * tile_bytes(linear.bits, padded);
  w.scales = static_cast<const char*>(w.scales) + scales;
  if (w.offsets) w.offsets = static_cast<const char*>(w.offsets) + scales;
  w.n = (end * kTileRows < w.n ? end * kTileRows : w.n) - first * kTileRows;
  part.bias = nullptr;
  return part;
}

}  // namespace memlm
