// What the kernels should compute, in double precision over unpacked weights, and how far they may
// be off: written from memlm/formats.py, memlm/ops/_matmul.py and tests/numerics.py, not from csrc.
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

enum class Kind { kSymmetric, kAsymmetric, kTable };

// The levels of NormalFloat.
constexpr double kLevels[16] = {
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0};

struct Format {
  Kind kind;
  int bits;
  int64_t group;  // 0: the row

  bool offsets() const { return kind == Kind::kAsymmetric; }
  int low() const { return bits == 8 ? -128 : 0; }
  int high() const { return bits == 8 ? 127 : (1 << bits) - 1; }
  int zero() const { return offsets() || bits == 8 ? 0 : bits == 4 ? 8 : 1; }
  // What a code stands for, in scales; integer products round levels to 1/127.
  double value(int code, bool integers) const {
    if (kind != Kind::kTable) return code - zero();
    return integers ? std::nearbyint(kLevels[code] * 127) / 127 : kLevels[code];
  }
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
  std::vector<int> q;     // [n, k]
  Array scales, offsets;  // in tiles
  std::vector<uint8_t> codes;

  // scale and offset: [n, groups].
  Weights(Format f, int64_t rows, int64_t columns, std::vector<int> integers, memlm_dtype dtype,
          const Values& scale, const Values& offset)
      : format(f), n(rows), k(columns), q(std::move(integers)),
        scales(dtype, to_tiles(scale, n, format.groups(k))),
        offsets(dtype, format.offsets() ? to_tiles(offset, n, format.groups(k)) : Values()) {
    const int64_t padded = format.padded(k);
    codes.resize(round_up(n, kTile) * padded * format.bits / 8 + 1);  // the codes start at 1
    const int fields = 8 / format.bits, block_k = 4 * fields;
    for (int64_t r = 0; r < n; ++r)
      for (int64_t c = 0; c < k; ++c) {
        const int64_t block = r / kTile * (padded / block_k) + c / block_k;
        const auto code = static_cast<uint8_t>(q[r * k + c]);
        codes[1 + (block * kTile + r % kTile) * 4 + c % 4] |=
            code << c % block_k / 4 * format.bits;
      }
  }
  memlm_packed packed() const {
    memlm_packed w{};
    w.codes = codes.data() + 1;
    w.scales = scales.data();
    w.offsets = format.offsets() ? offsets.data() : nullptr;
    w.levels = format.kind == Kind::kTable ? memlm_nf4_levels : nullptr;
    w.scale_dtype = scales.dtype;
    w.n = n, w.k = k, w.group = format.group;
    return w;
  }
  // The two parts of one weight: the scale times what the code stands for, and the offset.
  double product(int64_t r, int64_t c, bool integers = false) const {
    return scale(r, c) * format.value(q[r * k + c], integers);
  }
  double scale(int64_t r, int64_t c) const { return scales.values[group_index(r, c)]; }
  double offset(int64_t r, int64_t c) const {
    return format.offsets() ? offsets.values[group_index(r, c)] : 0;
  }

 private:
  int64_t group_index(int64_t r, int64_t c) const {
    const int64_t group = format.group ? c / format.group : 0;
    return (r / kTile * format.groups(k) + group) * kTile + r % kTile;
  }
};

// Activations rounded to int8, a scale for each `span`, with f32 arithmetic like the kernels', so
// that codes and scales come out the same.
inline void quantize(const double* x, int64_t k, int64_t span, int8_t* codes, float* scales) {
  for (int64_t start = 0; start < k; start += span) {
    const int64_t end = start + span < k ? start + span : k;
    float largest = 0;
    for (int64_t i = start; i < end; ++i)
      largest = std::fmax(largest, static_cast<float>(std::fabs(x[i])));
    const float inverse = 127 / largest;
    scales[start / span] = std::isinf(inverse) ? 0 : largest / 127;
    for (int64_t i = start; i < end; ++i) {
      const float product = static_cast<float>(x[i]) * inverse;
      codes[i] = std::isinf(inverse) ? 0 : static_cast<int8_t>(std::nearbyint(product));
    }
  }
}

// One group of weights as memlm/_rounding.py rounds it, with f32 arithmetic in its order, so that
// codes, scale and offset come out the same.
struct RoundedGroup {
  std::vector<int> codes;
  double scale, offset;
};

class GroupRounding {
 public:
  GroupRounding(const Format& format, bool ternary, memlm_dtype scale_dtype)
      : format_(format), stored_(scale_dtype) {
    const int count = ternary ? 3 : format.bits == 8 ? 255 : 1 << format.bits;
    for (int code = 0; code < count; ++code) {
      const double level = format.bits == 8 ? code - 127 : format.value(code, false);
      levels_.push_back(static_cast<float>(level));
    }
    reach_ = levels_.back();
    if (format.offsets()) reach_ /= 2;
    else if (std::fabs(levels_[0]) >= reach_) reach_ = levels_[0];
  }

  RoundedGroup operator()(std::vector<float> w) {
    for (float& x : w) x += 0.0f;  // -0.0 becomes 0.0
    float low = w[0], high = w[0];
    for (float x : w) {
      low = x < low ? x : low;
      high = x > high ? x : high;
    }
    float top = -low > high ? low : high;
    middle_ = 0;
    if (format_.offsets()) {
      top = high * 0.5f - low * 0.5f;
      middle_ = low * 0.5f + high * 0.5f;
    }
    int exponent = top == 0 ? -126 : std::ilogb(top);
    exponent = exponent < -126 ? -126 : exponent > 126 ? 126 : exponent;
    unit_ = std::ldexp(1.0f, exponent);
    top /= unit_;
    for (float& x : w) x = (x - middle_) / unit_;
    if (format_.bits == 8) {
      best_ = stored({std::fabs(top) / 127, 0});
    } else {
      search(w, top);
    }
    RoundedGroup result{{}, best_.s, best_.o};
    const Affine a = loaded(best_);
    for (float x : w) {
      const int code = nearest((x - a.o) * inverse(a.s));
      result.codes.push_back(format_.bits == 8 ? code - 127 : code);
    }
    return result;
  }

 private:
  struct Affine { float s, o; };

  Format format_;
  Float stored_;
  std::vector<float> levels_;
  double reach_;
  float middle_ = 0, unit_ = 1, least_ = 0;
  Affine best_ = {0, 0};

  static float inverse(float s) { return std::fabs(s) < 0x1p-126f ? 0 : 1 / s; }
  float as_stored(float x) const {
    return static_cast<float>(stored_.decode(stored_.encode(x)));
  }
  Affine stored(Affine a) const {
    return {as_stored(a.s * unit_), format_.offsets() ? as_stored(a.o * unit_ + middle_) : 0};
  }
  Affine loaded(Affine a) const {
    return {a.s / unit_, format_.offsets() ? (a.o - middle_) / unit_ : 0};
  }
  // The code of the nearest level; of two, of the even number, or from a table of the lower.
  int nearest(float x) const {
    const int last = static_cast<int>(levels_.size()) - 1;
    if (format_.kind != Kind::kTable) {
      const float number = std::nearbyint(x) - levels_[0];
      return number > 0 ? number < static_cast<float>(last) ? static_cast<int>(number) : last : 0;
    }
    int code = 0;
    while (code < last && (levels_[code] + levels_[code + 1]) / 2 < x) ++code;
    return code;
  }
  void consider(const std::vector<float>& w, Affine found) {
    const Affine a = loaded(found);
    float sum = 0;
    for (float v : w) {
      const float x = v - a.o, error = levels_[nearest(x * inverse(a.s))] * a.s - x;
      sum += error * error;
    }
    if (sum < least_) least_ = sum, best_ = found;
  }
  void search(const std::vector<float>& w, float top) {
    const double shrink_step = levels_.size() == 16 ? 0.05 : 0.1;
    const float share = 1 / static_cast<float>(w.size());
    float total = 0;
    for (float x : w) total += x;
    best_ = stored({top * static_cast<float>(1 / reach_), -top});
    least_ = INFINITY;
    consider(w, best_);
    for (int i = 0; i < 7; ++i) {
      const double shrink = std::round(100 * (1 - i * shrink_step)) / 100;
      const float s = top * static_cast<float>(shrink / reach_);
      const float o = format_.offsets() ? top * static_cast<float>(-shrink) : 0;
      float dot = 0, squares = 0, count = 0;
      for (float x : w) {
        const float level = levels_[nearest((x - o) * inverse(s))];
        dot += x * level;
        squares += level * level;
        count += level;
      }
      const float mean = format_.offsets() ? count * share : 0;
      dot -= total * mean;
      squares -= count * mean;
      const float best_s = dot * inverse(squares);
      consider(w, stored({best_s, total * share - best_s * mean}));
    }
  }
};

// The first n rows of w [n, stride], rounded.
inline Weights quantized(const Format& format, bool ternary, memlm_dtype scale_dtype, int64_t n,
                         int64_t k, const Array& w, int64_t stride) {
  const int64_t groups = format.groups(k), span = format.group ? format.group : k;
  GroupRounding round(format, ternary, scale_dtype);
  std::vector<int> codes(n * k);
  Values scales(n * groups), offsets(n * groups);
  for (int64_t r = 0; r < n; ++r)
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = g * span, count = k - first < span ? k - first : span;
      const double* row = &w.values[r * stride + first];
      std::vector<float> group(row, row + count);
      group.resize(span, format.offsets() ? group.back() : 0);
      const RoundedGroup rounded = round(group);
      for (int64_t i = 0; i < count; ++i) codes[r * k + first + i] = rounded.codes[i];
      scales[r * groups + g] = rounded.scale;
      offsets[r * groups + g] = rounded.offset;
    }
  return Weights(format, n, k, codes, scale_dtype, scales, offsets);
}

// What a kernel makes of activations, and of the weights with them.
enum class Rounding { kNone, kInt8Per32, kInt8PerRow, kBf16 };

struct Expected {
  Values y, bound;
};

// The layers around a product; NULL leaves one out.
struct Around {
  const Array *bias, *norm, *residual;
  bool swiglu;
};
constexpr float kEps = 1e-5f;

// silu(gate) * up.
inline Expected swiglu(const Expected& both, int64_t m, int64_t n) {
  const double u = Float(MEMLM_F32).roundoff();
  Expected result{Values(m * n), Values(m * n)};
  for (int64_t i = 0; i < m * n; ++i) {
    const int64_t g = i / n * 2 * n + i % n;
    const double up = both.y[g + n], up_off = both.bound[g + n];
    const double silu = both.y[g] / (1 + std::exp(-both.y[g]));
    // The slope of silu is at most 1.1; exp, sum and division are a few roundings; exp stays within
    // 2^-126 and 2^127.
    const double silu_off = 1.1 * both.bound[g] + 16 * u * std::fabs(silu) +
                            std::ldexp(std::fabs(both.y[g]), -126);
    result.y[i] = silu * up;
    result.bound[i] = silu_off * (std::fabs(up) + up_off) + std::fabs(silu) * up_off +
                      u * std::fabs(silu * up);
  }
  return result;
}

// The first m rows of x [m, stride] times W, with what stands around; rounded to x's format last.
inline Expected matmul(const Weights& w, const Array& x, int64_t stride, int64_t m,
                       Rounding rounding, const Around& around) {
  const double u = Float(MEMLM_F32).roundoff();
  const int64_t n = w.n, k = w.k, span = rounding == Rounding::kInt8PerRow ? k : kSub;
  const bool integers = rounding == Rounding::kInt8Per32 || rounding == Rounding::kInt8PerRow;
  Values weights(n * k), magnitudes(n * k);
  for (int64_t r = 0; r < n; ++r)
    for (int64_t c = 0; c < k; ++c) {
      const double product = w.product(r, c, integers);
      weights[r * k + c] = product + w.offset(r, c);
      magnitudes[r * k + c] = std::fabs(product) + std::fabs(w.offset(r, c));
    }
  // Rounded activations are integers times a scale: only the sums of 32 are rounded.
  const bool known = integers && !around.norm;
  const double terms = known ? (k + kSub - 1) / kSub : k;
  Expected result{Values(m * n), Values(m * n)};
  for (int64_t row = 0; row < m; ++row) {
    Values h(x.values.begin() + row * stride, x.values.begin() + row * stride + k);
    double off = 0;      // the left side's own relative error
    Values variance(k);  // of its rounding, uniform over a step
    if (around.norm) {
      double squares = 0;
      for (double v : h) squares += v * v;
      for (int64_t i = 0; i < k; ++i)
        h[i] *= around.norm->values[i] / std::sqrt(squares / static_cast<double>(k) + kEps);
      off = (16 + 5 * std::sqrt(k)) * u;
    }
    std::vector<int8_t> codes(k);
    std::vector<float> scales((k + span - 1) / span);
    if (integers) quantize(h.data(), k, span, codes.data(), scales.data());
    for (int64_t i = 0; i < k; ++i) {
      const double scale = integers ? scales[i / span] : 0;
      if (known)
        h[i] = codes[i] * scale;
      else if (integers)
        variance[i] = scale * scale / 12;
      else if (rounding == Rounding::kBf16)  // of x, and of the weight that it meets
        variance[i] = 2 * std::pow(2 * Float(MEMLM_BF16).roundoff() * h[i], 2) / 12;
    }
    for (int64_t r = 0; r < n; ++r) {
      double y = 0, size = 0, spread = 0;
      for (int64_t i = 0; i < k; ++i) {
        y += h[i] * weights[r * k + i];
        size += std::fabs(h[i]) * magnitudes[r * k + i];
        if (variance[i] > 0) spread += variance[i] * weights[r * k + i] * weights[r * k + i];
      }
      if (around.bias) y += around.bias->values[r], size += std::fabs(around.bias->values[r]);
      result.y[row * n + r] = y;
      // 4: the dequantised weight, the product, the scale and the bias round once each.  7 standard
      // deviations of k independent roundings.
      result.bound[row * n + r] =
          (4 + 5 * std::sqrt(terms)) * u * size + off * size + 7 * std::sqrt(spread);
    }
  }
  if (around.swiglu) result = swiglu(result, m, n / 2);
  const Float format(x.dtype);
  for (size_t i = 0; i < result.y.size(); ++i) {
    double &y = result.y[i], &bound = result.bound[i];
    if (around.residual) {
      const double other = around.residual->values[i];
      y += other;
      bound += u * (std::fabs(y) + std::fabs(other));
    }
    bound += format.roundoff() * (std::fabs(y) + bound) + format.smallest();
  }
  return result;
}

}  // namespace reference
