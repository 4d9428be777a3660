// Random calls of the C ABI with buffers of exactly the size that memlm.h asks for, to be run under
// sanitizers: every read or write beyond one, every overflow and every race shows.
// usage: fuzz CASES
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>

#include "../../csrc/formats.h"
#include "../../csrc/include/memlm.h"

namespace {

std::mt19937 random_bits(1);

int64_t pick(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random_bits);
}

using Bytes = std::unique_ptr<uint8_t[]>;

Bytes zeros(int64_t size) { return Bytes(new uint8_t[size]()); }

void require(memlm_status status) {
  if (status == MEMLM_OK) return;
  std::fprintf(stderr, "%s\n", memlm_last_error());
  std::exit(1);
}

void one_case() {
  const int bits = pick(0, 1) ? 4 : 8;
  const int64_t groups[] = {32, 64, 128, 0};
  const int64_t group = groups[pick(0, bits == 8 ? 3 : 2)];
  const bool swiglu = pick(0, 2) == 0, norm = pick(0, 1);
  const int64_t m = pick(0, 40), n = swiglu ? 32 * pick(1, 2) : pick(1, 70), k = pick(1, 300);
  const auto dtype = static_cast<memlm_dtype>(pick(0, 2));
  const int64_t size = dtype == MEMLM_F32 ? 4 : 2;
  const int64_t columns = swiglu ? n / 2 : n;

  const int64_t padded = memlm::padded_k(k, group), tiles = memlm::div_up(n, memlm::kTileRows);
  const int64_t code_bytes = tiles * memlm::tile_bytes(bits, padded);
  const memlm_dtype scale_dtype = pick(0, 1) ? MEMLM_F16 : MEMLM_F32;
  const int64_t scale_bytes = tiles * (group ? padded / group : 1) * memlm::kTileRows *
                              (scale_dtype == MEMLM_F16 ? 2 : 4);
  const Bytes codes = zeros(code_bytes), scales = zeros(scale_bytes), offsets = zeros(scale_bytes);
  for (int64_t i = 0; i < code_bytes; ++i) codes[i] = static_cast<uint8_t>(random_bits());
  const bool has_offsets = bits == 4 && pick(0, 1);
  const memlm_packed w = {codes.get(), scales.get(), has_offsets ? offsets.get() : nullptr,
                          scale_dtype, n, k, group, nullptr, MEMLM_DENSE, nullptr, nullptr};

  // The last row ends where its last element does, not at its stride.
  const auto matrix = [&](int64_t width, int64_t stride) {
    return zeros(m ? ((m - 1) * stride + width) * size : 0);
  };
  const int64_t x_stride = k + pick(0, 3), y_stride = columns + pick(0, 3);
  const int64_t r_stride = columns + pick(0, 3);
  const Bytes x = matrix(k, x_stride), y = matrix(columns, y_stride);
  const Bytes residual = matrix(columns, r_stride);
  const Bytes bias = zeros(n * size), norm_weight = zeros(k * size);
  for (int64_t i = 0; m && i < ((m - 1) * x_stride + k) * size; ++i)
    x[i] = static_cast<uint8_t>(random_bits());  // NaN, Inf and denormals among them
  const memlm_matmul_args args = {
      m, x.get(), x_stride, pick(0, 1) ? bias.get() : nullptr, y.get(), y_stride, dtype,
      static_cast<int>(pick(0, 1)), static_cast<int>(pick(1, 3)), norm ? norm_weight.get() : nullptr,
      1e-5f, swiglu, pick(0, 1) ? residual.get() : nullptr, r_stride};
  require(bits == 4 ? memlm_w4_matmul(&w, &args) : memlm_w8_matmul(&w, &args));

  int64_t ids[9];
  const int64_t count = pick(0, 9);
  for (int64_t& id : ids) id = pick(0, n - 1);
  const Bytes rows = zeros(count * k * size);
  require(memlm_embedding(&w, bits, ids, count, dtype, rows.get(), 2));
  const int64_t row = pick(0, n), some = pick(0, n - row);
  const Bytes floats = zeros(some * k * size);
  require(memlm_dequantize(&w, bits, row, some, dtype, floats.get(), 2));

  if (m == 0) return;
  // x [m, k] to a packed matrix; not all of it finite.
  const int64_t x_tiles = memlm::div_up(m, memlm::kTileRows);
  const Bytes x_codes = zeros(x_tiles * memlm::tile_bytes(bits, padded));
  const int64_t x_scale_bytes = scale_bytes / tiles * x_tiles;
  const Bytes x_scales = zeros(x_scale_bytes), x_offsets = zeros(x_scale_bytes);
  const bool table = bits == 4 && !has_offsets && pick(0, 1);
  const memlm_quantize_args quantize = {
      m, k, x.get(), x_stride, dtype, bits, 0, group, table ? memlm_nf4_levels : nullptr, scale_dtype,
      x_codes.get(), x_scales.get(), has_offsets ? x_offsets.get() : nullptr,
      static_cast<int>(pick(1, 3))};
  require(memlm_quantize_weight(&quantize));
  float largest;
  memlm_largest_magnitude(m, k, x.get(), x_stride, dtype, &largest, 2);
}

}  // namespace

int main(int, char** argv) {
  const int cases = std::atoi(argv[1]);
  for (const char* const* isa = memlm_isas(); *isa; ++isa) {
    require(memlm_set_isa(*isa));
    for (int i = 0; i < cases; ++i) one_case();
    std::printf("%s: %d cases\n", *isa, cases);
  }
}
