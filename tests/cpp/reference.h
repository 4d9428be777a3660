// What the kernels should compute, in double precision over unpacked weights, and how far they may be
// off: written from memlm/formats.py, memlm/ops/_matmul.py and tests/numerics.py, not from csrc.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../../csrc/include/memlm.h"

namespace reference {

// A binary floating-point format.
struct Float {
  int bytes, mantissa, min_exponent;

  explicit Float(memlm_dtype dtype)
      : bytes(dtype == MEMLM_F32 ? 4 : 2),
        mantissa(dtype == MEMLM_F32 ? 23 : dtype == MEMLM_F16 ? 10 : 7),
        min_exponent(dtype == MEMLM_F16 ? -14 : -126) {}
  double roundoff() const { return std::ldexp(1.0, -mantissa - 1); }
  double smallest() const { return std::ldexp(1.0, min_exponent - mantissa); }
  uint32_t infinity() const { return (1u << (8 * bytes - 1)) - (1u << mantissa); }

  uint32_t encode(double value) const {  // to nearest, ties to even
    const uint32_t sign = std::signbit(value) ? 1u << (8 * bytes - 1) : 0;
    if (std::isnan(value)) return infinity() + 1;
    if (std::isinf(value)) return sign | infinity();
    int exponent = value == 0 ? min_exponent : std::ilogb(value);
    if (exponent < min_exponent) exponent = min_exponent;
    const auto units =
        static_cast<uint32_t>(std::nearbyint(std::ldexp(std::fabs(value), mantissa - exponent)));
    const uint32_t bits = units + (static_cast<uint32_t>(exponent - min_exponent) << mantissa);
    return sign | (bits < infinity() ? bits : infinity());
  }
  double decode(uint32_t bits) const {
    const bool negative = bits >> (8 * bytes - 1);
    const uint32_t magnitude = bits & ((1u << (8 * bytes - 1)) - 1);
    const int biased = static_cast<int>(magnitude >> mantissa);
    const uint32_t fraction = magnitude & ((1u << mantissa) - 1);
    double value;
    if (magnitude >= infinity())
      value = magnitude == infinity() ? INFINITY : NAN;
    else if (biased == 0)
      value = std::ldexp(fraction, min_exponent - mantissa);
    else
      value = std::ldexp(fraction + (1u << mantissa), biased - 1 + min_exponent - mantissa);
    return negative ? -value : value;
  }
};

using Values = std::vector<double>;

// Numbers as a kernel gets them, and their values after the rounding to that format.  The storage
// starts one element past an allocation: aligned for one element only.
struct Array {
  memlm_dtype dtype;
  Values values;
  std::vector<uint8_t> bytes;

  Array(memlm_dtype type, Values numbers) : dtype(type), values(std::move(numbers)) {
    const Float format(dtype);
    bytes.resize((values.size() + 1) * format.bytes);
    for (size_t i = 0; i < values.size(); ++i) {
      const uint32_t bits = format.encode(values[i]);
      std::memcpy(&bytes[(i + 1) * format.bytes], &bits, format.bytes);  // little-endian
      values[i] = format.decode(bits);
    }
  }
  const void* data() const { return bytes.data() + Float(dtype).bytes; }
};

constexpr int64_t kTile = 16, kSub = 32;  // rows of a tile; k that share an activation's scale

inline int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

struct Format {
  int bits;
  int64_t group;  // 0: the row
  bool offsets;

  int zero() const { return bits == 4 && !offsets ? 8 : 0; }
  int64_t padded(int64_t k) const { return round_up(k, group > kSub ? group : kSub); }
  int64_t groups(int64_t k) const { return group ? padded(k) / group : 1; }
};

// rows [n, count] -> [tiles, count, 16], padded with zeros.
inline Values to_tiles(const Values& rows, int64_t n, int64_t count) {
  Values tiles(round_up(n, kTile) * count);
  for (int64_t r = 0; r < n; ++r)
    for (int64_t i = 0; i < count; ++i)
      tiles[(r / kTile * count + i) * kTile + r % kTile] = rows[r * count + i];
  return tiles;
}

struct Weights {
  Format format;
  int64_t n, k;
  std::vector<int> q;     // [n, k]: 0..15, or -128..127
  Array scales, offsets;  // in tiles
  std::vector<uint8_t> codes;

  // scale and offset: [n, groups].
  Weights(Format f, int64_t rows, int64_t columns, std::vector<int> integers, memlm_dtype dtype,
          const Values& scale, const Values& offset)
      : format(f), n(rows), k(columns), q(std::move(integers)),
        scales(dtype, to_tiles(scale, n, format.groups(k))),
        offsets(dtype, format.offsets ? to_tiles(offset, n, format.groups(k)) : Values()) {
    const int64_t padded = format.padded(k);
    codes.resize(round_up(n, kTile) * padded * format.bits / 8 + 1);  // the codes start at 1
    for (int64_t r = 0; r < n; ++r)
      for (int64_t c = 0; c < k; ++c) {
        const int64_t tile = r / kTile, lane = r % kTile;
        const int64_t blocks = padded * format.bits / 32, per_block = 32 / format.bits;
        uint8_t& byte =
            codes[1 + ((tile * blocks + c / per_block) * kTile + lane) * 4 + c % 4];
        const auto code = static_cast<uint8_t>(q[r * k + c]);
        byte = format.bits == 8 ? code : byte | code << (c % 8 < 4 ? 0 : 4);
      }
  }
  memlm_packed packed() const {
    memlm_packed w{};
    w.codes = codes.data() + 1;
    w.scales = scales.data();
    w.offsets = format.offsets ? offsets.data() : nullptr;
    w.scale_dtype = scales.dtype;
    w.n = n, w.k = k, w.group = format.group;
    return w;
  }
  // s q' and o of one weight, which is their sum.
  double product(int64_t r, int64_t c) const {
    return scales.values[group_index(r, c)] * (q[r * k + c] - format.zero());
  }
  double offset(int64_t r, int64_t c) const {
    return format.offsets ? offsets.values[group_index(r, c)] : 0;
  }

 private:
  int64_t group_index(int64_t r, int64_t c) const {
    const int64_t group = format.group ? c / format.group : 0;
    return (r / kTile * format.groups(k) + group) * kTile + r % kTile;
  }
};

// Activations as the fast mode rounds them, a scale for each 32: exact, and f32 like the kernels'.
inline void quantize(double* x, int64_t k) {
  for (int64_t start = 0; start < k; start += kSub) {
    const int64_t end = start + kSub < k ? start + kSub : k;
    float largest = 0;
    for (int64_t i = start; i < end; ++i)
      largest = std::fmax(largest, static_cast<float>(std::fabs(x[i])));
    const float inverse = 127 / largest, scale = largest / 127;
    for (int64_t i = start; i < end; ++i) {
      const float product = static_cast<float>(x[i]) * inverse;
      x[i] = std::isinf(inverse) ? 0 : static_cast<double>(std::nearbyint(product)) * scale;
    }
  }
}

struct Expected {
  Values y, bound;
};

// The layers around a product; NULL leaves one out.
struct Around {
  const Array *bias, *norm, *residual;
};
constexpr float kEps = 1e-5f;

// The first m rows of x [m, stride] times W, rounded to x's format at the end.
inline Expected matmul(const Weights& w, const Array& x, int64_t stride, int64_t m, bool fast,
                       const Around& around) {
  const double u = Float(MEMLM_F32).roundoff();
  const int64_t n = w.n, k = w.k;
  Values weights(n * k), magnitudes(n * k);
  for (int64_t r = 0; r < n; ++r)
    for (int64_t c = 0; c < k; ++c) {
      weights[r * k + c] = w.product(r, c) + w.offset(r, c);
      magnitudes[r * k + c] = std::fabs(w.product(r, c)) + std::fabs(w.offset(r, c));
    }
  // Rounded activations are integers times a scale: only the sums of 32 are rounded.
  const bool integers = fast && !around.norm;
  const double terms = integers ? (k + kSub - 1) / kSub : k;
  Expected result{Values(m * n), Values(m * n)};
  for (int64_t row = 0; row < m; ++row) {
    Values h(x.values.begin() + row * stride, x.values.begin() + row * stride + k);
    // The left side's own error, and the variance of its rounding to steps of 1/127.
    double off = 0;
    Values variance(k);
    if (around.norm) {
      double squares = 0;
      for (double v : h) squares += v * v;
      for (int64_t i = 0; i < k; ++i)
        h[i] *= around.norm->values[i] / std::sqrt(squares / static_cast<double>(k) + kEps);
      off = (16 + 5 * std::sqrt(k)) * u;
      for (int64_t start = 0; fast && start < k; start += kSub) {
        const int64_t end = start + kSub < k ? start + kSub : k;
        double largest = 0;
        for (int64_t i = start; i < end; ++i) largest = std::fmax(largest, std::fabs(h[i]));
        for (int64_t i = start; i < end; ++i) variance[i] = largest * largest / (127 * 127 * 12);
      }
    } else if (fast) {
      quantize(h.data(), k);
    }
    for (int64_t r = 0; r < n; ++r) {
      double y = 0, size = 0, spread = 0;
      for (int64_t i = 0; i < k; ++i) {
        y += h[i] * weights[r * k + i];
        size += std::fabs(h[i]) * magnitudes[r * k + i];
        if (variance[i] > 0) spread += variance[i] * weights[r * k + i] * weights[r * k + i];
      }
      if (around.bias) y += around.bias->values[r], size += std::fabs(around.bias->values[r]);
      // 4: the dequantised weight, the product, the scale and the bias round once each.
      double bound = (4 + 5 * std::sqrt(terms)) * u * size + off * size + 7 * std::sqrt(spread);
      if (around.residual) {
        const double other = around.residual->values[row * n + r];
        y += other;
        bound += u * (std::fabs(y) + std::fabs(other));
      }
      const Float format(x.dtype);
      bound += format.roundoff() * (std::fabs(y) + bound) + format.smallest();
      result.y[row * n + r] = y;
      result.bound[row * n + r] = bound;
    }
  }
  return result;
}

}  // namespace reference
