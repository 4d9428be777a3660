// The paged cache, byte by byte, and attention over it in double precision: written from
// memlm/kv_formats.py, memlm/ops/paged_attention.py and tests/test_paged_attention.py, not from csrc.
#pragma once
#include "reference_attention.h"

namespace reference {

struct KvFormat {
  memlm_kv_type type;
  int64_t tokens, dim;

  bool quantized() const { return type >= MEMLM_KV_INT8; }
  bool tails() const { return type == MEMLM_KV_INT4; }
  int64_t width() const { return round_up(dim, quantized() ? 32 : 16); }
  int64_t key_width() const { return quantized() ? width() : dim; }
  int64_t group() const { return width() % 64 ? 32 : 64; }
  int64_t groups() const { return width() / group(); }
  int bits(bool value) const {
    return type == MEMLM_KV_F32 ? 32 : type == MEMLM_KV_BF16 ? 16 : type == MEMLM_KV_INT8 ? 8 : value ? 4 : 5;
  }
  // Where keys, values, their scales, and the next block begin.
  int64_t values() const { return tokens * key_width() * bits(false) / 8; }
  int64_t key_scales() const { return values() + tokens * width() * bits(true) / 8; }
  int64_t value_scales() const { return key_scales() + (quantized() ? 2 * tokens * groups() : 0); }
  int64_t bytes() const { return value_scales() + (quantized() ? 2 * tokens * groups() : 0); }
  KvFormat tail() const { return {MEMLM_KV_BF16, tokens, width()}; }
};

inline void hadamard(float* x, int64_t n) {
  const int64_t size = n & -n;
  for (int64_t i = 0; i < n; i += 16) {
    float sums[16] = {};
    for (int j = 0; j < 16; ++j)
      for (int k = 0; k < 16; ++k) {
        int odd = 0;
        for (int bit = 1; bit < 16; bit *= 2) odd ^= (j & k & bit) != 0;
        sums[k] += odd ? -x[i + j] : x[i + j];
      }
    std::memcpy(x + i, sums, sizeof sums);
  }
  for (int64_t step = 16; step < size; step *= 2)
    for (int64_t i = 0; i < n; ++i)
      if (!(i & step)) {
        const float a = x[i], b = x[i + step];
        x[i] = a + b;
        x[i + step] = a - b;
      }
  const float factor = 1 / std::sqrt(static_cast<float>(size));
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

inline void set_bits(uint8_t& byte, int shift, int width, int bits) {
  const int mask = ((1 << width) - 1) << shift;
  byte = static_cast<uint8_t>((byte & ~mask) | (bits << shift & mask));
}

// Element (row, k) of a matrix in tiles of 16 rows of k_all.
inline void set_code(uint8_t* matrix, int bits, int64_t k_all, int64_t row, int64_t k, int code) {
  uint8_t* const tile = matrix + row / 16 * k_all * 16 * bits / 8;
  row %= 16;
  if (bits == 8) {
    tile[(k / 4 * 16 + row) * 4 + k % 4] = static_cast<uint8_t>(code);
    return;
  }
  uint8_t* const run = tile + k / 32 * 64 * bits;
  k %= 32;
  set_bits(run[(k / 8 * 16 + row) * 4 + k % 4], k % 8 / 4 * 4, 4, code & 15);
  if (bits == 5) {
    const int64_t bit = (k / 4 * 16 + row) * 4 + k % 4;
    set_bits(run[256 + bit / 8], bit % 8, 1, code >> 4);
  }
}

inline void set_float(uint8_t* matrix, memlm_dtype dtype, int64_t k_all, int64_t row, int64_t k, double x) {
  const Float format(dtype);
  const uint32_t bits = format.encode(x);
  std::memcpy(matrix + ((row / 16 * k_all + k) * 16 + row % 16) * format.bytes, &bits, format.bytes);
}

// Key or value x [dim] as token t of a block; returns what the kernels then find there: [width], after
// the transform where there is one.
inline Values store(const KvFormat& f, uint8_t* block, bool value, int64_t t, const double* x) {
  const int64_t width = value ? f.width() : f.key_width();
  std::vector<float> numbers(width);
  for (int64_t c = 0; c < f.dim; ++c) numbers[c] = static_cast<float>(x[c]);
  uint8_t* const matrix = block + (value ? f.values() : 0);
  const auto put = [&](int64_t c, const auto& set) {
    value ? set(f.tokens, c, t) : set(f.key_width(), t, c);
  };
  Values found(numbers.begin(), numbers.end());
  if (!f.quantized()) {
    const memlm_dtype dtype = f.type == MEMLM_KV_F32 ? MEMLM_F32 : MEMLM_BF16;
    for (int64_t c = 0; c < width; ++c) {
      put(c, [&](int64_t all, int64_t row, int64_t k) { set_float(matrix, dtype, all, row, k, numbers[c]); });
      found[c] = Float(dtype).decode(Float(dtype).encode(numbers[c]));
    }
    return found;
  }
  hadamard(numbers.data(), width);
  const int bits = f.bits(value), least = bits == 8 ? -127 : -(1 << (bits - 1));
  const int most = bits == 8 ? 127 : -least - 1, zero = bits == 8 ? 0 : -least;
  for (int64_t g = 0; g < f.groups(); ++g) {
    const float* const span = &numbers[g * f.group()];
    float largest = 0;
    for (int64_t i = 0; i < f.group(); ++i)
      if (std::fabs(span[i]) > std::fabs(largest)) largest = span[i];
    const uint32_t half = Float(MEMLM_F16).encode(largest / static_cast<float>(least));
    const int64_t place = value ? g * f.tokens + t : (t / 16 * f.groups() + g) * 16 + t % 16;
    std::memcpy(block + (value ? f.value_scales() : f.key_scales()) + 2 * place, &half, 2);
    const auto scale = static_cast<float>(Float(MEMLM_F16).decode(half));
    const float inverse = scale != 0 ? 1 / scale : 0;
    for (int64_t i = 0; i < f.group(); ++i) {
      double q = span[i] * inverse;
      q = std::nearbyint(q < least ? least : q > most ? most : q);
      found[g * f.group() + i] = q * scale;
      put(g * f.group() + i, [&](int64_t all, int64_t row, int64_t k) {
        set_code(matrix, bits, all, row, k, static_cast<int>(q) + zero);
      });
    }
  }
  return found;
}

// A query times scale, [width], as integer products see it (rounded) and as it is (exact).
struct Query {
  Values rounded, exact;

  Query(const KvFormat& f, const double* q, float scale) : exact(f.key_width()) {
    std::vector<float> x(f.key_width());
    for (int64_t c = 0; c < f.dim; ++c) x[c] = static_cast<float>(q[c]) * scale;
    if (f.quantized()) hadamard(x.data(), f.key_width());
    exact.assign(x.begin(), x.end());
    rounded = exact;
    if (!f.quantized()) return;
    std::vector<int8_t> codes(exact.size());
    std::vector<float> scales(f.groups());
    quantize(exact.data(), f.width(), f.group(), codes.data(), scales.data());
    for (size_t c = 0; c < exact.size(); ++c)
      rounded[c] = static_cast<double>(codes[c]) * scales[c / f.group()];
  }
};

}  // namespace reference
