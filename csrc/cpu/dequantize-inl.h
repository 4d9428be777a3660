// Rows of W back to floats: for dequantize, and for embedding, which picks rows by index.
#pragma once
#include "w2_matmul-inl.h"
#include "w4_matmul-inl.h"

namespace memlm {
namespace MEMLM_ISA {

// Codes of one row, k from 32 s to 32 s + 31, as the floats that they stand for: values[code], or,
// of 8 bits, the code itself.
inline void codes_to_floats(const uint8_t* tile, int bits, const float* values, int lane, int64_t s,
                            float* out) {
  const uint8_t* p = tile + tile_bytes(bits, s * kActGroup) + lane * kLaneK;
  const int fields = 8 / bits;  // k in a byte, 4 apart
  for (int b = 0; b < 8; ++b)
    for (int j = 0; j < kLaneK; ++j) {
      const uint8_t byte = p[b / fields * kBlock + j];
      const int code = byte >> b % fields * bits & ((1 << bits) - 1);
      out[b * 4 + j] = bits == 8 ? static_cast<float>(static_cast<int8_t>(byte)) : values[code];
    }
}

inline float scale_at(const void* scales, memlm_dtype dtype, int64_t i) {
  if (dtype == MEMLM_F32) return static_cast<const float*>(scales)[i];
  uint16_t lanes[16] = {static_cast<const uint16_t*>(scales)[i]};
  float out[16];
  f_store(out, f_load_f16(lanes));
  return out[0];
}

inline void dequantize_rows(const memlm_packed& w, int bits, const int64_t* ids, int64_t row,
                            int64_t count, memlm_dtype dtype, void* out) {
  const int64_t padded = padded_k(w.k, w.group), group = w.group ? w.group : padded;
  const int zero = w.offsets ? 0 : bits == 4 ? W4<false>::kZero : W2<false>::kZero;
  float values[16];
  for (int code = 0; code < 16; ++code)
    values[code] = w.levels ? w.levels[code] : static_cast<float>(code - zero);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t r = ids ? ids[i] : row + i, tile = r / kTileRows;
    const int lane = static_cast<int>(r % kTileRows);
    const uint8_t* codes = static_cast<const uint8_t*>(w.codes) + tile * tile_bytes(bits, padded);
    for (int64_t s = 0; s * kActGroup < w.k; ++s) {
      const int64_t g = (tile * (padded / group) + s * kActGroup / group) * kTileRows + lane;
      const float scale = scale_at(w.scales, w.scale_dtype, g);
      const float offset = w.offsets ? scale_at(w.offsets, w.scale_dtype, g) : 0.0f;
      alignas(64) float v[kActGroup];
      codes_to_floats(codes, bits, values, lane, s, v);
      for (float& f : v) f = f * scale + offset;
      const int64_t left = w.k - s * kActGroup;
      store_floats(out, dtype, i * w.k + s * kActGroup, left < kActGroup ? left : kActGroup, v);
    }
  }
}

}  // namespace MEMLM_ISA
}  // namespace memlm
