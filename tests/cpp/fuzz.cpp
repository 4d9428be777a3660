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

Bytes random_bytes(int64_t size) {
  Bytes bytes = zeros(size);
  for (int64_t i = 0; i < size; ++i) bytes[i] = static_cast<uint8_t>(random_bits());
  return bytes;
}

// The product of args with a sparse W[n, k] of any pattern.  The bits of a bitmap, and the places of
// pairs, may be any: they must lead nowhere outside the codes.
void sparse_case(const memlm_matmul_args& args, int64_t n, int64_t k) {
  memlm_packed w = {};
  w.pattern = static_cast<memlm_pattern>(pick(MEMLM_TWO_OF_FOUR, MEMLM_BLOCKS));
  const int64_t tiles = memlm::div_up(n, memlm::kTileRows);
  const int all_bits[] = {2, 4, 8, 16, 32}, groups[] = {32, 64, 128};
  const bool is_blocks = w.pattern == MEMLM_BLOCKS;
  const int bits = is_blocks ? all_bits[pick(0, 4)] : 4;
  w.n = n;
  w.k = k;
  w.group = is_blocks ? 32 : groups[pick(0, 2)];
  w.scale_dtype = pick(0, 1) ? MEMLM_F16 : MEMLM_F32;
  if (bits == 4 && pick(0, 1)) w.levels = memlm_nf4_levels;
  const int64_t padded = memlm::padded_k(k, w.group), runs = padded / memlm::kActGroup;
  const std::unique_ptr<int64_t[]> starts(new int64_t[tiles + 1]());
  const std::unique_ptr<int32_t[]> runs_of_blocks(new int32_t[tiles * runs]);
  int64_t code_bytes = memlm::tile_bytes(2, padded) * tiles, scale_groups = padded / w.group * tiles;
  const int64_t density = pick(0, 2);
  for (int64_t t = 0; t < tiles; ++t) {
    int64_t& end = starts[t + 1] = starts[t];
    if (!is_blocks) end += pick(0, memlm::tile_bytes(4, padded));
    for (int64_t run = 0; is_blocks && run < runs; ++run)
      if (pick(0, 2) < density) runs_of_blocks[end++] = static_cast<int32_t>(run);
  }
  if (w.pattern != MEMLM_TWO_OF_FOUR) w.starts = starts.get();
  if (w.pattern == MEMLM_UNSTRUCTURED) code_bytes = starts[tiles] + 64;
  if (is_blocks) {
    scale_groups = starts[tiles];
    code_bytes = memlm::tile_bytes(bits, memlm::kActGroup) * starts[tiles];
  }
  const int64_t scale_bytes =
      scale_groups * memlm::kTileRows * (w.scale_dtype == MEMLM_F16 ? 2 : 4);
  const Bytes codes = random_bytes(code_bytes), scales = random_bytes(scale_bytes);
  const Bytes offsets = random_bytes(scale_bytes);
  const Bytes places = random_bytes(tiles * padded / memlm::kLaneK * memlm::kPlaceBytes);
  // Of exactly as many blocks as there are.
  const std::unique_ptr<int32_t[]> exact(new int32_t[starts[tiles] * is_blocks]);
  if (is_blocks) std::memcpy(exact.get(), runs_of_blocks.get(), starts[tiles] * sizeof(int32_t));
  w.codes = codes.get();
  if (bits <= 8) w.scales = scales.get();
  if (is_blocks && bits < 8 && !w.levels && pick(0, 1)) w.offsets = offsets.get();
  w.places = is_blocks ? static_cast<const void*>(exact.get()) : places.get();
  if (bits > 8) w.levels = nullptr;
  if (!is_blocks) return require(memlm_w4_sparse_matmul(&w, &args));
  require(memlm_block_sparse_matmul(&w, bits, &args));
  const int64_t m = args.m;
  const std::unique_ptr<float[]> grad(new float[m * n]()), x(new float[m * k]());
  const std::unique_ptr<float[]> grad_x(new float[m * k]);
  const std::unique_ptr<float[]> values(new float[starts[tiles] * 512]);
  require(memlm_block_sparse_grad_x(&w, bits, m, grad.get(), grad_x.get(), args.threads));
  if (bits == 32)
    require(memlm_block_sparse_grad_values(&w, m, grad.get(), x.get(), values.get(), args.threads));
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
  sparse_case(args, n, k);

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
