// What the kernels of adamw_8bit share on all devices: the codes of both moments, as
// memlm/dynamic_codes.py specifies them, and the factors of a step, as memlm/ops/adamw_8bit.py does.
#pragma once
#include <math.h>
#include <stdint.h>

#include "include/memlm.h"

namespace memlm {

constexpr int kMomentBlock = 256;  // numbers that share a scale
constexpr int kDecades = 7;
constexpr int kBounds = kDecades + 1;
constexpr int kSignedZero = 127;  // the code of 0; unsigned ones begin with it

// multiply, add, least, most: by how many bounds are below a number; padded to a vector's lanes.
struct DynamicCodes {
  float levels[256];
  float bounds[kBounds];
  float multiply[16], add[16], least[16], most[16];
};

// static: the per-ISA files must not share a copy compiled for one of them.
static constexpr double dynamic_level(int j, bool is_signed) {
  constexpr double kTen[kDecades] = {1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1};
  const int zero = is_signed ? 0 : 1, one = is_signed ? 128 : 256;
  if (j == zero || j == one) return j == one;
  int b = 0;
  while (j >> (b + 1)) ++b;
  return kTen[b - zero] * (0.9 * (j + 0.5) / (1 << b) - 0.8);
}

static constexpr DynamicCodes dynamic_codes(bool is_signed) {
  constexpr double kTen[kDecades] = {1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1};
  const int zero = is_signed ? 0 : 1, one = is_signed ? 128 : 256;
  DynamicCodes c = {};
  for (int code = 0; code < 256; ++code) {
    const int j = is_signed ? (code < kSignedZero ? kSignedZero - code : code - kSignedZero) : code + 1;
    const double level = dynamic_level(j, is_signed);
    c.levels[code] = static_cast<float>(is_signed && code < kSignedZero ? -level : level);
  }
  c.add[0] = c.least[0] = c.most[0] = static_cast<float>(zero);
  for (int d = 0; d < kDecades; ++d) {
    const int b = d + zero, least = 1 << b;
    const double below = dynamic_level(d ? least - 1 : zero, is_signed);
    c.bounds[d] = static_cast<float>(d || is_signed ? (below + dynamic_level(least, is_signed)) / 2 : 0);
    c.multiply[d + 1] = static_cast<float>((1 << b) / (0.9 * kTen[d]));
    c.add[d + 1] = static_cast<float>(0.8 * (1 << b) / 0.9 - 0.5);
    c.least[d + 1] = static_cast<float>(least);
    c.most[d + 1] = static_cast<float>(2 * least - 1);
  }
  c.bounds[kDecades] = static_cast<float>((dynamic_level(one - 1, is_signed) + 1) / 2);
  c.add[kBounds] = c.least[kBounds] = c.most[kBounds] = static_cast<float>(one);
  return c;
}

static constexpr DynamicCodes kSignedCodes = dynamic_codes(true);
static constexpr DynamicCodes kUnsignedCodes = dynamic_codes(false);

// What numbers of one step are multiplied with: computed in f64, rounded to f32.
struct AdamWFactors {
  float beta1, rest1, beta2, rest2, decay, size, unbias, eps;
};

// The name of one that is not accepted, or NULL.
static inline const char* wrong_hyperparameter(const memlm_adamw_8bit_args& a) {
  const auto fits = [](double x, double below) { return x >= 0 && x < below; };
  if (!fits(a.lr, INFINITY)) return "lr";
  if (!fits(a.beta1, 1)) return "beta1";
  if (!fits(a.beta2, 1)) return "beta2";
  if (!fits(a.eps, INFINITY)) return "eps";
  if (!fits(a.weight_decay, INFINITY)) return "weight_decay";
  return a.step < 1 ? "step" : nullptr;
}

// For the C ABI's functions alone: the per-ISA files get them as numbers.
static inline AdamWFactors adamw_factors(const memlm_adamw_8bit_args& a) {
  const double step = static_cast<double>(a.step);
  return {static_cast<float>(a.beta1),
          static_cast<float>(1 - a.beta1),
          static_cast<float>(a.beta2),
          static_cast<float>(1 - a.beta2),
          static_cast<float>(1 - a.lr * a.weight_decay),
          static_cast<float>(a.lr / (1 - pow(a.beta1, step))),
          static_cast<float>(1 / sqrt(1 - pow(a.beta2, step))),
          static_cast<float>(a.eps)};
}

}  // namespace memlm
