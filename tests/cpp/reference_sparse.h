// Sparse matrices for the C ABI, made of dense ones whose other weights are zero: written from
// memlm/sparse_formats.py, not from csrc.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#include "reference.h"

namespace reference {

struct Sparse {
  Weights dense;  // with zeros for what is not stored
  int bits;       // of the values; 16 and 32: floats
  memlm_pattern pattern;
  std::vector<uint8_t> codes, scales, offsets, places;
  std::vector<int64_t> starts;

  memlm_packed packed() const {
    memlm_packed w = dense.packed();
    const bool blocks = pattern == MEMLM_BLOCKS;
    w.codes = codes.data();
    if (blocks) w.scales = bits > 8 ? nullptr : scales.data();
    if (blocks && w.offsets) w.offsets = offsets.data();
    w.pattern = pattern;
    w.starts = starts.empty() ? nullptr : starts.data();
    w.places = places.data();
    return w;
  }
};

using Kept = std::function<bool(int64_t row, int64_t k)>;

// W with the weights that are not kept set to zero, also where zero has no code.
inline Weights with_zeros(const Weights& w, const Kept& kept) {
  const Format& f = w.format;
  const int64_t groups = f.groups(w.k);
  std::vector<int> q = w.q;
  Values scale(w.n * groups), offset(w.n * groups);
  for (int64_t r = 0; r < w.n; ++r)
    for (int64_t c = 0; c < w.k; ++c) {
      const int64_t i = r * groups + (f.group ? c / f.group : 0);
      if (!kept(r, c)) {
        q[r * w.k + c] = f.kind == Kind::kTable ? 7 : f.zero();
      } else {
        scale[i] = w.scales.values[((r / kTile) * groups + c / f.group) * kTile + r % kTile];
        offset[i] = w.offset(r, c);
      }
    }
  return Weights(f, w.n, w.k, q, w.scales.dtype, scale, offset);
}

inline void append(std::vector<uint8_t>& to, const uint8_t* from, int64_t count) {
  to.insert(to.end(), from, from + count);
}

// Blocks of 16 x 32, those that kept(tile, run of 32 k).  bits 16 and 32: dense is of 8 bits, and its
// numbers are stored as floats, which hold them exactly.
inline Sparse blocks(const Weights& full, int bits, const Kept& kept) {
  Sparse s{with_zeros(full, [&](int64_t r, int64_t c) { return kept(r / kTile, c / kSub); }), bits,
           MEMLM_BLOCKS, {}, {}, {}, {}, {0}};
  const Weights& w = s.dense;
  const int64_t tiles = round_up(w.n, kTile) / kTile, runs = w.format.padded(w.k) / kSub;
  const int64_t code_bytes = kTile * kSub * w.format.bits / 8;
  const int64_t scale_bytes = kTile * Float(w.scales.dtype).bytes;
  const auto* scales = static_cast<const uint8_t*>(w.scales.data());
  const auto* offsets = static_cast<const uint8_t*>(w.offsets.data());
  for (int64_t t = 0; t < tiles; ++t) {
    for (int64_t g = 0; g < runs; ++g) {
      if (!kept(t, g)) continue;
      const auto place = static_cast<int32_t>(g);
      append(s.places, reinterpret_cast<const uint8_t*>(&place), sizeof place);
      const int64_t block = t * runs + g;
      if (bits > 8) {
        const Float type(bits == 32 ? MEMLM_F32 : MEMLM_BF16);
        for (int64_t j = 0; j < kSub; ++j)
          for (int64_t r = 0; r < kTile; ++r) {
            const int64_t row = t * kTile + r, k = g * kSub + j;
            const bool inside = row < w.n && k < w.k;
            const uint32_t value = type.encode(inside ? w.product(row, k) : 0);
            append(s.codes, reinterpret_cast<const uint8_t*>(&value), type.bytes);
          }
      } else {
        append(s.codes, w.codes.data() + 1 + block * code_bytes, code_bytes);
        append(s.scales, scales + block * scale_bytes, scale_bytes);
        if (w.format.offsets()) append(s.offsets, offsets + block * scale_bytes, scale_bytes);
      }
    }
    s.starts.push_back(static_cast<int64_t>(s.places.size()) / 4);
  }
  // No blocks at all: there is memory all the same, which is not looked at.
  for (auto* part : {&s.codes, &s.scales, &s.offsets, &s.places}) part->push_back(0);
  return s;
}

// Of 4 bits: two of four, or any, those that are kept.
inline Sparse compressed(const Weights& full, memlm_pattern pattern, const Kept& kept) {
  const bool pairs = pattern == MEMLM_TWO_OF_FOUR;
  Sparse s{with_zeros(full, kept), 4, pattern, {}, {}, {}, {}, {}};
  const Weights& w = s.dense;
  const int64_t tiles = round_up(w.n, kTile) / kTile, fours = w.format.padded(w.k) / 4;
  const int zero = w.format.kind == Kind::kTable ? 7 : w.format.zero();
  if (!pairs) s.starts.push_back(0);
  for (int64_t t = 0; t < tiles; ++t) {
    for (int64_t f = 0; f < fours; ++f) {
      uint64_t word = 0;
      std::vector<uint8_t> nibbles;
      for (int64_t r = 0; r < kTile; ++r) {
        std::vector<int> here, others;
        const auto code = [&](int j) {
          const int64_t row = t * kTile + r, k = f * 4 + j;
          return static_cast<uint8_t>(row < w.n && k < w.k ? w.q[row * w.k + k] : zero);
        };
        for (int j = 0; j < 4; ++j) {
          const int64_t row = t * kTile + r, k = f * 4 + j;
          (row < w.n && k < w.k && kept(row, k) ? here : others).push_back(j);
        }
        if (pairs) {
          for (size_t i = 0; here.size() < 2; ++i) here.push_back(others[i]);
          if (here[0] > here[1]) std::swap(here[0], here[1]);
          word |= static_cast<uint64_t>(here[0] | here[1] << 2) << ((r % 2) * 32 + r / 2 * 4);
        } else {
          for (int j : here) word |= uint64_t{1} << (4 * r + j);
        }
        for (int j : here) nibbles.push_back(code(j));
      }
      if (nibbles.size() % 2) nibbles.push_back(0);
      for (size_t i = 0; i < nibbles.size(); i += 2)
        s.codes.push_back(static_cast<uint8_t>(nibbles[i] | nibbles[i + 1] << 4));
      append(s.places, reinterpret_cast<const uint8_t*>(&word), sizeof word);
    }
    if (!pairs) s.starts.push_back(static_cast<int64_t>(s.codes.size()));
  }
  if (!pairs) s.codes.resize(s.codes.size() + 64, 0xff);  // may be loaded, is not used
  return s;
}

}  // namespace reference
