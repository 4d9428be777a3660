// A step of AdamW with moments in 8 bits, in double precision: written from memlm/dynamic_codes.py and
// memlm/ops/adamw_8bit.py, not from csrc.
#pragma once
#include <algorithm>

#include "reference.h"

namespace reference {

constexpr int64_t kMomentBlock = 256;

// By code.  Leading zeros of a byte are decades, the bits behind the first one a fraction.
inline Values moment_levels(bool is_signed) {
  Values levels = {0, 1};
  for (int bits = is_signed ? 1 : 2; bits < (is_signed ? 128 : 256); ++bits) {
    int width = is_signed ? 7 : 8, zeros = 0;
    while (!(bits >> (width - 1 - zeros))) ++zeros;
    const int rest = width - 1 - zeros;
    const double share = ((bits & ((1 << rest) - 1)) + 0.5) / (1 << rest);
    const double level = std::pow(10.0, -zeros) * (0.1 + 0.9 * share);
    levels.push_back(level);
    if (is_signed) levels.push_back(-level);
  }
  std::sort(levels.begin(), levels.end());
  return levels;
}

struct Moment {
  std::vector<uint8_t> codes;
  std::vector<float> absmax;

  double at(const Values& levels, int64_t i) const { return levels[codes[i]] * absmax[i / kMomentBlock]; }
};

// Whether codes and magnitudes are those of `exact`, which may be off by `off`: the nearest level, but for
// what five f32 operations do to numbers between two; unsigned ones above 0 do not become 0.
inline bool holds(const Moment& m, const Values& levels, bool is_signed, const Values& exact, const Values& off) {
  for (int64_t start = 0; start < static_cast<int64_t>(exact.size()); start += kMomentBlock) {
    const int64_t end = std::min<int64_t>(start + kMomentBlock, exact.size());
    double largest = 0, worst = 0;
    for (int64_t i = start; i < end; ++i) {
      largest = std::max(largest, std::fabs(exact[i]));
      worst = std::max(worst, off[i]);
    }
    if (!(std::fabs(m.absmax[start / kMomentBlock] - largest) <= worst)) return false;
    for (int64_t i = start; i < end; ++i) {
      const double x = exact[i] / largest;
      double least = INFINITY;
      for (size_t code = 0; code < levels.size(); ++code)
        if (is_signed || code || x == 0) least = std::min(least, std::fabs(levels[code] - x));
      const double slack = std::ldexp(std::fabs(x), -16) + 2 * off[i] / largest;
      if (!(std::fabs(levels[m.codes[i]] - x) <= least + slack)) return false;
      if (!is_signed && x > 0 && !m.codes[i]) return false;
    }
  }
  return true;
}

}  // namespace reference
