// Sparse matrices as memlm/sparse_formats.py draws them, made from dense ones: written from there, not
// from csrc.
#pragma once
#include <algorithm>

#include "reference.h"

namespace reference {

// The weights of a dense matrix that `kept` [n, k] names, and nothing of the others.
struct SparseWeights {
  const Weights& dense;
  memlm_pattern pattern;
  int bits;
  std::vector<uint8_t> codes;   // from 1 on: aligned for a byte only
  std::vector<float> floats;    // of 32 bits
  std::vector<uint16_t> halves; // of 16
  Array scales, offsets;
  std::vector<int64_t> starts;
  std::vector<int32_t> runs;
  std::vector<uint8_t> places;

  // value_bits: of blocks, 32 and 16 for the numbers that the codes stand for.
  SparseWeights(const Weights& w, memlm_pattern which, const std::vector<bool>& kept, int value_bits)
      : dense(w), pattern(which), bits(value_bits), codes(1), scales(w.scales), offsets(w.offsets) {
    if (pattern == MEMLM_BLOCKS) {
      floats.reserve(1), halves.reserve(1);  // an address even without blocks
      blocks(kept);
    } else {
      nibbles(kept);
    }
  }
  memlm_packed packed() const {
    memlm_packed w = dense.packed();
    w.codes = bits == 32 ? static_cast<const void*>(floats.data())
              : bits == 16 ? static_cast<const void*>(halves.data()) : codes.data() + 1;
    w.scales = bits > 8 ? nullptr : scales.data();
    w.offsets = bits <= 8 && dense.format.offsets() ? offsets.data() : nullptr;
    w.pattern = pattern;
    w.group = pattern == MEMLM_BLOCKS ? kSub : dense.format.group;
    w.starts = pattern == MEMLM_TWO_OF_FOUR ? nullptr : starts.data();
    w.places = pattern == MEMLM_BLOCKS ? static_cast<const void*>(runs.data()) : places.data();
    return w;
  }

 private:
  int code(int64_t r, int64_t c) const {
    return r < dense.n && c < dense.k ? dense.q[r * dense.k + c] : 0;
  }
  // A block is stored if its first weight is kept.
  void blocks(const std::vector<bool>& kept) {
    const int64_t tiles = round_up(dense.n, kTile) / kTile, count = round_up(dense.k, kSub) / kSub;
    Values scale, offset;
    starts.push_back(0);
    for (int64_t t = 0; t < tiles; ++t) {
      for (int64_t run = 0; run < count; ++run) {
        if (!kept[t * kTile * dense.k + run * kSub]) continue;
        const int fields = bits <= 8 ? 8 / bits : 1, step = 4 * fields;
        for (int64_t k = run * kSub; bits <= 8 && k < (run + 1) * kSub; k += step)
          for (int64_t r = t * kTile; r < (t + 1) * kTile; ++r)
            for (int j = 0; j < 4; ++j) {
              int byte = 0;
              for (int f = 0; f < fields; ++f) byte |= (code(r, k + j + 4 * f) & ((1 << bits) - 1)) << f * bits;
              codes.push_back(static_cast<uint8_t>(byte));
            }
        for (int64_t k = run * kSub; bits > 8 && k < (run + 1) * kSub; ++k)
          for (int64_t r = t * kTile; r < (t + 1) * kTile; ++r) {
            const bool inside = r < dense.n && k < dense.k;
            const double value = inside ? dense.product(r, k) : 0;
            floats.push_back(static_cast<float>(value));
            halves.push_back(static_cast<uint16_t>(Float(MEMLM_BF16).encode(value)));
          }
        for (int64_t r = 0; r < kTile; ++r) {
          const int64_t at = (t * count + run) * kTile + r;
          scale.push_back(dense.scales.values[at]);
          if (dense.format.offsets()) offset.push_back(dense.offsets.values[at]);
        }
        runs.push_back(static_cast<int32_t>(run));
      }
      starts.push_back(static_cast<int64_t>(runs.size()));
    }
    scales = Array(dense.scales.dtype, scale);
    offsets = Array(dense.scales.dtype, offset);
  }
  void nibbles(const std::vector<bool>& kept) {
    const int64_t tiles = round_up(dense.n, kTile) / kTile, padded = dense.format.padded(dense.k);
    const auto is_kept = [&](int64_t r, int64_t c) {
      return r < dense.n && c < dense.k && kept[r * dense.k + c];
    };
    for (int64_t t = 0; t < tiles; ++t) {
      starts.push_back(static_cast<int64_t>(codes.size()) - 1);
      for (int64_t k = 0; k < padded; k += 4) {
        uint64_t place = 0;
        std::vector<int> stored;
        for (int64_t r = t * kTile; r < (t + 1) * kTile; ++r) {
          if (pattern == MEMLM_UNSTRUCTURED) {
            for (int j = 0; j < 4; ++j)
              if (is_kept(r, k + j)) {
                place |= uint64_t{1} << (4 * (r % kTile) + j);
                stored.push_back(code(r, k + j));
              }
            continue;
          }
          std::vector<int> two;
          for (int j = 0; j < 4; ++j)
            if (is_kept(r, k + j)) two.push_back(j);
          for (int j = 0; two.size() < 2; ++j)
            if (std::find(two.begin(), two.end(), j) == two.end()) two.push_back(j);
          std::sort(two.begin(), two.end());
          for (int j : two)
            stored.push_back(is_kept(r, k + j) ? code(r, k + j) : dense.format.kind == Kind::kTable ? 7 : 8);
          place |= static_cast<uint64_t>(two[0] | two[1] << 2) << (r % 2 * 32 + r % kTile / 2 * 4);
        }
        if (stored.size() % 2) stored.push_back(0);
        for (size_t i = 0; i < stored.size(); i += 2)
          codes.push_back(static_cast<uint8_t>(stored[i] | stored[i + 1] << 4));
        for (int i = 0; i < 8; ++i) places.push_back(static_cast<uint8_t>(place >> 8 * i));
      }
    }
    starts.push_back(static_cast<int64_t>(codes.size()) - 1);
    if (pattern == MEMLM_UNSTRUCTURED) codes.resize(codes.size() + 64, 0xff);
  }
};

// W with what is not kept set to 0: codes that stand for it, or, in blocks, no scale and offset.
inline Weights zeroed(const Weights& w, memlm_pattern pattern, const std::vector<bool>& kept) {
  std::vector<int> q = w.q;
  const int64_t groups = w.format.groups(w.k);
  Values scale(w.n * groups), offset(w.n * groups);
  for (int64_t r = 0; r < w.n; ++r)
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t at = (r / kTile * groups + g) * kTile + r % kTile;
      const bool there =
          pattern != MEMLM_BLOCKS || (g * kSub < w.k && kept[r / kTile * kTile * w.k + g * kSub]);
      scale[r * groups + g] = there ? w.scales.values[at] : 0;
      if (w.format.offsets()) offset[r * groups + g] = there ? w.offsets.values[at] : 0;
    }
  for (size_t i = 0; pattern != MEMLM_BLOCKS && i < q.size(); ++i)
    if (!kept[i]) q[i] = w.format.kind == Kind::kTable ? 7 : w.format.zero();
  return Weights(w.format, w.n, w.k, q, w.scales.dtype, scale, offset);
}

}  // namespace reference
