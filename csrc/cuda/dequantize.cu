// Rows of W back to floats, computed in f32 as memlm/formats.py does, to the last bit: the code's number
// times the scale, rounded, plus the offset, rounded, then rounded to the result's type.
//
// A thread takes one word of a row, 4 bytes of codes: 4, 8 or 16 consecutive k.  A warp takes 8 rows and 4
// words of each, so that rows beside each other are read in whole sectors, 8 words of a block of 64 bytes,
// and 4 lanes write what lies together; a block takes 8 rows and 32 words.
#include "dequantize.h"

#include <string.h>

#include "elements.h"

namespace memlm::cuda {
namespace {

constexpr int kThreads = 256, kTile = 16;
constexpr int kBlockRows = 8, kWarpWords = kWarp / kBlockRows, kBlockWords = kThreads / kBlockRows;

struct Rows {
  const uint8_t *codes, *scales, *offsets;
  int scale_bytes;  // of one
  bool has_levels;
  float levels[16];  // else code q stands for q - zero
  float zero;  // of 8 bits, whose sign is a bit: 128
  int64_t n, row, count;
  const int64_t* ids;
  int k, words, group_shift, groups;  // words of a row; 2^group_shift k in a group
  int at_once;                        // numbers of out that may be stored at once: 8, of 16 bits, 4 or 1
};

// 2^23, whose float has integers below it in its last bits.
constexpr uint32_t kMagic = 0x4b000000;
constexpr float kMagicValue = 8388608;

template <class T, int bits>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(const Rows p, T* out) {
  constexpr int kNumbers = 32 / bits, kFields = 8 / bits;  // of a word, of a byte
  float* const levels = shared<float>();
  if (bits == 4 && p.has_levels) {
    if (thread() < 16) levels[thread()] = p.levels[thread()];
    MEMLM_SYNC_THREADS();
  }
  const int64_t at = static_cast<int64_t>(block_x()) * kBlockRows + lane() / kWarpWords;
  const int word = block_y() * kBlockWords + warp() * kWarpWords + lane() % kWarpWords;
  const int first = word * kNumbers;  // k
  if (at >= p.count || first >= p.k) return;

  const int64_t row = p.ids ? p.ids[at] : p.row + at;
  const bool inside = row >= 0 && row < p.n;
  float values[kNumbers];
  for (int i = 0; i < kNumbers; i++) values[i] = as_float(0x7fc00000);
  if (inside) {
    const int64_t tile = row / kTile, in_tile = row % kTile;
    const int64_t scale = (tile * p.groups + (first >> p.group_shift)) * kTile + in_tile;
    const float factor = scale_at(p.scales, p.scale_bytes, scale);
    const float offset = p.offsets ? scale_at(p.offsets, p.scale_bytes, scale) : 0;
    const uint32_t word_of_row = load<uint32_t>(p.codes + ((tile * p.words + word) * kTile + in_tile) * 4);
    const uint32_t codes = bits == 8 ? word_of_row ^ 0x80808080 : word_of_row;
    const float less = kMagicValue + p.zero;
    for (int i = 0; i < kNumbers; i++) {
      const uint32_t lowest = codes >> (i % 4 * 8 + i / 4 % kFields * bits);
      const float number = bits == 4 && p.has_levels
                               ? levels[lowest & 0xf]
                               : as_float(select_bits<(1 << bits) - 1, kMagic>(lowest)) - less;
      values[i] = multiply(number, factor) + offset;
    }
  }
  T* const to = out + at * p.k + first;
  if constexpr (kNumbers >= 8 && sizeof(T) == 2) {
    if (p.at_once == 8) {  // k is a multiple of 8
      for (int i = 0; i < kNumbers && first + i < p.k; i += 8) {
        const float* const v = values + i;
        store(to + i,
              Vec4{pair<T>(v[0], v[1]), pair<T>(v[2], v[3]), pair<T>(v[4], v[5]), pair<T>(v[6], v[7])});
      }
      return;
    }
  }
  for (int i = 0; i < kNumbers; i += 4) {
    const float four[4] = {values[i], values[i + 1], values[i + 2], values[i + 3]};
    if (p.at_once >= 4 && first + i < p.k) {  // k is a multiple of 4
      store_four(to + i, four);
    } else {
      for (int j = 0; j < 4 && first + i + j < p.k; j++) to[i + j] = from_float<T>(four[j]);
    }
  }
}

template <class T>
memlm_status begin(const Rows& p, int bits, Grid blocks, void* out, void* stream) {
  void (*kernel)(Rows, T*) = bits == 2   ? &dequantize_kernel<T, 2>
                             : bits == 4 ? &dequantize_kernel<T, 4>
                                         : &dequantize_kernel<T, 8>;
  return started(launch(kernel, blocks, kThreads, sizeof p.levels, stream, p, static_cast<T*>(out)));
}

}  // namespace

memlm_status dequantize_rows(const memlm_packed* w, int bits, const int64_t* ids, int64_t row, int64_t count,
                             memlm_dtype dtype, void* out, memlm_cuda_queue* queue) {
  MEMLM_CHECK(bits == 2 || bits == 4 || bits == 8, "bits: got %d, accepted are 2, 4 and 8", bits);
  MEMLM_PASS(check_packed(w, bits));
  Gpu gpu;
  MEMLM_PASS(find_gpu(MEMLM_F16, &gpu));
  if (!count) return MEMLM_OK;

  const int64_t k = padded_k(w), words = k * bits / 32, chunks = ceil_div(words, kBlockWords);
  const Grid blocks = {ceil_div(count, kBlockRows), chunks};
  MEMLM_CHECK(blocks.x <= INT32_MAX && chunks <= 65535,
              "out: %lld rows of %lld numbers are too many for one call", static_cast<long long>(count),
              static_cast<long long>(w->k));
  Rows p = {};
  p.codes = static_cast<const uint8_t*>(w->codes);
  p.scales = static_cast<const uint8_t*>(w->scales);
  p.offsets = static_cast<const uint8_t*>(w->offsets);
  p.scale_bytes = bytes_of(w->scale_dtype);
  p.has_levels = w->levels != nullptr;
  if (w->levels) memcpy(p.levels, w->levels, sizeof p.levels);
  p.zero = bits == 8 ? 128 : w->offsets ? 0 : bits == 4 ? 8 : 1;
  p.n = w->n;
  p.row = row;
  p.count = count;
  p.ids = ids;
  p.k = static_cast<int>(w->k);
  p.words = static_cast<int>(words);
  p.group_shift = !w->group ? 31 : w->group == 32 ? 5 : w->group == 64 ? 6 : 7;
  p.groups = static_cast<int>(w->group ? k / w->group : 1);
  p.at_once = 1;
  for (const int numbers : {4, 8}) {
    if (w->k % numbers == 0 && is_aligned(out, numbers * bytes_of(dtype))) p.at_once = numbers;
  }
  const auto run = dtype == MEMLM_F32 ? &begin<float> : dtype == MEMLM_F16 ? &begin<f16> : &begin<bf16>;
  return run(p, bits, blocks, out, queue->stream);
}

}  // namespace memlm::cuda

memlm_status memlm_cuda_dequantize(const memlm_packed* w, int bits, int64_t row, int64_t rows,
                                   memlm_dtype dtype, void* out, memlm_cuda_queue* queue) {
  MEMLM_PASS(memlm::cuda::check_rows_of(w, row, rows, dtype, out));
  return memlm::cuda::dequantize_rows(w, bits, nullptr, row, rows, dtype, out, queue);
}
