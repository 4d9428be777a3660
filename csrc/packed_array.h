// A packed W[n, k] of arrays, checked: dense against the layout that memlm/formats.py draws, sparse
// against that of memlm/sparse_formats.py.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>

#include "array.h"
#include "formats.h"
#include "include/memlm.h"

namespace memlm {

constexpr int64_t kSpareBytes = 64;  // behind unstructured codes

inline memlm_dtype float_dtype(const Array& array) {
  if (array.dtype == kF32) return MEMLM_F32;
  if (array.dtype == kF16) return MEMLM_F16;
  if (array.dtype == kBF16) return MEMLM_BF16;
  throw py::type_error(array.name + ": got " + text(array.dtype) +
                       ", accepted are float32, float16, bfloat16");
}

struct Packed {
  int bits = 0;
  Array codes;
  OptionalArray scales, offsets, starts, places;
  memlm_packed c = {};

  // Of memlm/arrays.py's (Format, n, k, codes, scales, offsets), of a sparse one starts, places too.
  explicit Packed(const py::tuple& w)
      : codes(w[3], "codes"),
        scales(w[4], "scales"),
        offsets(w[5], "offsets"),
        starts(w.size() > 6 ? py::object(w[6]) : py::none(), "starts"),
        places(w.size() > 6 ? py::object(w[7]) : py::none(), "places") {
    const py::object format = w[0];
    bits = format.attr("bits").cast<int>();
    c.n = w[1].cast<int64_t>();
    c.k = w[2].cast<int64_t>();
    if (c.n < 1 || c.n > INT32_MAX || c.k < 1 || c.k > INT32_MAX)
      throw py::value_error("n, k: got " + text(Shape{c.n, c.k}) + ", accepted is 1 to 2^31-1");
    const bool sparse = w.size() > 6, floats = bits > 8;
    c.group = kActGroup;
    if (!floats) {
      const py::object values = sparse ? py::object(format.attr("values")) : format;
      c.group = values.attr("group").cast<int64_t>();
      c.levels = values.attr("codebook").cast<std::string>() == "nf" ? memlm_nf4_levels : nullptr;
    }
    if (sparse) c.pattern = pattern_of(format.attr("pattern").cast<std::string>());
    const int64_t tiles = div_up(c.n, kTileRows), padded = padded_k(c.k, c.group);
    const Shape per_group = {tiles, c.group ? padded / c.group : 1, kTileRows};
    switch (c.pattern) {
      case MEMLM_DENSE:
        check_codes(bits == 8 ? kI8 : kU8,
                    {tiles, tile_bytes(bits, padded) / kBlock, kTileRows, kLaneK});
        check_scales(per_group);
        break;
      case MEMLM_BLOCKS: check_blocks(tiles); break;
      case MEMLM_TWO_OF_FOUR:
        check_codes(kU8, {tiles, padded / kLaneK, kTileRows});
        check_scales(per_group);
        check_bits({tiles, padded / kLaneK, kPlaceBytes});
        check_pairs();
        break;
      case MEMLM_UNSTRUCTURED:
        if (codes.shape.size() != 1 || codes.shape[0] < kSpareBytes)
          throw py::value_error("codes: got shape " + text(codes.shape) +
                                ", expected [bytes], 64 of them beyond the last code");
        check_codes(kU8, codes.shape);
        check_scales(per_group);
        check_bits({tiles, padded / kLaneK, kPlaceBytes});
        check_starts(tiles, codes.shape[0] - kSpareBytes);
        check_bitmap(tiles, padded);
        break;
    }
  }

  void expect_bits(int wanted) const {
    if (bits != wanted)
      throw py::value_error("packed: got " + std::to_string(bits) + " bits, accepted are " +
                            std::to_string(wanted));
  }

 private:
  static memlm_pattern pattern_of(const std::string& name) {
    if (name == "block") return MEMLM_BLOCKS;
    return name == "2:4" ? MEMLM_TWO_OF_FOUR : MEMLM_UNSTRUCTURED;
  }

  void check_codes(Dtype dtype, const Shape& shape) {
    codes.expect(dtype, (" for " + std::to_string(bits) + " bits").c_str());
    codes.expect(shape);
    codes.expect_contiguous();
    c.codes = codes.data;
  }

  void check_scales(const Shape& shape) {
    if (!scales) throw py::type_error("scales: got None, accepted are float16, float32");
    c.scale_dtype = float_dtype(*scales);
    if (c.scale_dtype == MEMLM_BF16)
      throw py::type_error("scales: got bfloat16, accepted are float16, float32");
    scales->expect(shape);
    scales->expect_contiguous();
    if (offsets) {
      offsets->expect(scales->dtype, ", as scales");
      offsets->expect(shape);
      offsets->expect_contiguous();
    }
    c.scales = scales->data;
    c.offsets = offsets.data();
  }

  void check_starts(int64_t tiles, int64_t end) {
    if (!starts) throw py::type_error("starts: got None, expected int64");
    starts->expect(kI64, "");
    starts->expect(Shape{tiles + 1});
    starts->expect_contiguous();
    c.starts = reinterpret_cast<const int64_t*>(starts->data);
    if (c.starts[0] != 0 || c.starts[tiles] != end)
      throw py::value_error("starts: must ascend from 0 to " + std::to_string(end));
  }

  void check_blocks(int64_t tiles) {
    if (!places) throw py::type_error("places: got None, expected int32");
    places->expect(kI32, "");
    const int64_t count = places->shape.empty() ? 0 : places->shape[0];
    places->expect(Shape{count});
    places->expect_contiguous();
    c.places = places->data;
    if (bits > 8) {
      check_codes(bits == 32 ? kF32 : kBF16, {count, kActGroup, kTileRows});
      if (scales || offsets) throw py::type_error("scales, offsets: got arrays, floats have none");
    } else {
      check_codes(bits == 8 ? kI8 : kU8, {count, bits, kTileRows, kLaneK});
      check_scales({count, kTileRows});
    }
    static const char nothing[kBlock] = {};  // codes and scales of no blocks
    if (!count) {
      c.codes = nothing;
      c.scales = bits > 8 ? nullptr : nothing;
      c.offsets = nullptr;
    }
    check_starts(tiles, count);
    memlm_matmul_args none = {};  // of no rows: the weights are checked, and nothing is computed
    none.x_stride = c.k;
    none.y_stride = c.n;
    none.threads = 1;
    if (memlm_block_sparse_matmul(&c, bits, &none) != MEMLM_OK)
      throw py::value_error(memlm_last_error());
  }

  void check_bits(const Shape& shape) {
    if (!places) throw py::type_error("places: got None, expected uint8");
    places->expect(kU8, "");
    places->expect(shape);
    places->expect_contiguous();
    c.places = places->data;
  }

  void check_pairs() const {
    const auto* bytes = static_cast<const uint8_t*>(c.places);
    const int64_t count = places->shape[0] * places->shape[1] * kPlaceBytes;
    bool bad = false;
    for (int64_t i = 0; i < count; ++i) {
      const int b = bytes[i];
      bad |= (b & 3) >= (b >> 2 & 3) || (b >> 4 & 3) >= b >> 6;
    }
    if (bad) throw py::value_error("places: must have p0 < p1");
  }

  void check_bitmap(int64_t tiles, int64_t padded) const {
    const auto* bytes = static_cast<const uint8_t*>(c.places);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t rows = std::min<int64_t>(kTileRows, c.n - t * kTileRows);
      int64_t stored = 0;
      for (int64_t k = 0; k < padded; k += kLaneK, bytes += kPlaceBytes) {
        uint64_t word = 0, inside = 0;
        for (int i = kPlaceBytes; i-- > 0;) word = word << 8 | bytes[i];
        const int64_t columns = std::min<int64_t>(kLaneK, c.k - k);
        for (int64_t r = 0; columns > 0 && r < rows; ++r)
          inside |= ((1ull << columns) - 1) << kLaneK * r;
        if (word & ~inside)
          throw py::value_error("places: has weights beyond the " + std::to_string(c.n) + "x" +
                                std::to_string(c.k) + " of the matrix");
        stored += (__builtin_popcountll(word) + 1) / 2;
      }
      if (c.starts[t + 1] - c.starts[t] != stored)
        throw py::value_error(
            "starts: must be the bytes of codes that places have bits for, added up");
    }
  }
};

}  // namespace memlm
