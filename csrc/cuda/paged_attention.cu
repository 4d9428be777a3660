// paged_attention: over keys and values in blocks, read as they are stored (csrc/kv_blocks.h).
//
// Tiles of keys have 16 tokens as rows, tiles of values 16 channels, both with k behind: each is the A
// operand of a product as it lies.  The columns of B are query rows: the query heads of one key-value head,
// times its new tokens.  So the cache is read once for all of them:
//
//     scores^T [tokens, queries]  = keys [tokens, channels] queries^T
//     out^T [channels, queries]  += values^T [channels, tokens] weights^T
//
// A block has 8 or 32 query rows of one sequence and key-value head, and goes through its tokens in stages.
// In each the tiles of keys are dealt out to warps, then, for the sums, the tiles of channels: nothing is
// read from shared memory twice, and a warp waits for others with scores and weights alone.  While one half
// of the pair is worked on the other is on its way:
//
//     copy V | scores, by tiles of tokens | copy the next K | softmax, by rows | sums, by tiles of channels
//
// Codes are multiplied as they are, as int8: unpacking them would take most of the time.  For that queries
// and weights are integers of 16 bits, in two digits of 8 that are multiplied one by one:
//
//     number = step * (256 * high + low)      step = largest / 32,639
//
//   codes    of 32 k lane (g, c) has the eight from 8c on, of rows 2g and 2g + 1: 32-bit words as they lie;
//            of 4 and 5 bits, shifted to the upper end of a byte each
//   floats   of 16 k it has the four from 4c on, of rows g and g + 8: pairs, which come out of the matrices
//            by ldmatrix.trans; f32 one by one
//
// Sequences with few new tokens are shared out along their length as well, in chunks of a size that depends
// on the longest length alone: each block stores its sums, and a second kernel adds them up in the order of
// tokens (flash-decoding).  What a sequence's result is depends on nothing else in the step.
//
// Arithmetic, of products of floats in bf16, on compute capability 7.5 in f16 (called M): sums are f32; of
// codes they are exact up to a group of channels, or of values up to a stage.
//
//     int8, int4     codes as they are.  queries, after scale and Hadamard transform, as integers with a step
//                    for each row; weights times the values' scale likewise, with a step for each row, stage
//                    of 64 tokens and group of channels
//     keys, values   bf16 as they are; f32 as the sum of two M
//     queries        of floats as they are, in two M where their dtype is another than M
//     weights        exponentials as M; with f16 as the sum of two M
//
// An int4 cache's newest block is read from its tail, as bf16, with queries in f32 as the sum of two M.
#include "paged_attend.h"
#include "paged_rows.h"

namespace memlm::cuda {
namespace {

using namespace paged;

template <class T, memlm_kv_type type, int columns, int tiles>
__global__ void __launch_bounds__(kThreads, columns > 1 ? (tiles == 2 ? 3 : 2) : tiles == 2 ? 5 : 4)
    paged_attention_kernel(const PagedAttention a) {
  constexpr int kRows = 8 * columns, kOfRow = kThreads / kRows;
  constexpr int kParts = kQueryParts<T, type>, kWeightParts = std::is_same_v<T, f16> ? 2 : 1;
  constexpr bool kCoded = type >= MEMLM_KV_INT8;
  const KvCache& cache = a.cache;
  const KvLayout& f = cache.layout;
  const Deal deal = {a.group, kRows, 1};
  const int sequence = sequence_of(cache.rows, cache.sequences, deal, block_x());
  const int64_t first_row = cache.rows[sequence], count = cache.rows[sequence + 1] - first_row;
  const int64_t first = (block_x() - first_item(cache.rows, sequence, deal)) * kRows;
  const int length = static_cast<int>(cache.lengths[sequence]);
  if (first >= count * a.group) return;
  const Work w = {sequence, block_y(), static_cast<int>(least(kRows, count * a.group - first)), first_row,
                  length - static_cast<int>(count), static_cast<int>(first), kCoded ? 1 : a.scale};
  // What its queries see.
  const int position = w.before + w.first / a.group;
  int lo = a.window && position >= a.window ? position - a.window + 1 : 0;
  int hi = w.before + (w.first + w.rows - 1) / a.group + 1;
  const bool is_split = a.splits > 1 && count <= a.split_tokens;
  if (is_split) {
    lo = static_cast<int>(most(lo, static_cast<int64_t>(block_z()) * a.chunk));
    hi = static_cast<int>(least(hi, (block_z() + int64_t{1}) * a.chunk));
  }
  if (is_split ? lo >= hi : block_z() > 0) return;

  uint8_t* const stage = shared<uint8_t>();
  Room room;
  room.stage = stage;
  room.codes = reinterpret_cast<Vec4*>(stage + a.stage_bytes);
  room.pairs = stage + a.stage_bytes + (kCoded ? kRows * f.width * 2 : 0);
  room.lines = reinterpret_cast<float*>(room.pairs + kParts * kRows * f.width * 2);
  room.pitch = a.pitch;
  room.factors = room.lines + lines_of(kRows) * kRows * a.pitch;
  room.weight_steps = room.factors + kRows;
  room.steps = room.weight_steps + (kCoded ? f.groups : 0) * kRows;
  // Rows that there are not have weights and factors as well.
  for (float* i = room.lines + thread(); i < room.steps; i += kThreads) *i = 0;
  const auto queries = [&] { load_queries<T, kParts, kCoded, kRows, tiles / 2>(a, w, room); };

  State<columns, tiles> state = {};
  state.maximum = -INFINITY;
  if constexpr (type == MEMLM_KV_F32) {
    attend<Floats32, Floats32, kParts, kWeightParts>(a, w, room, f, nullptr, lo, hi, state, queries);
  } else if constexpr (type == MEMLM_KV_BF16) {
    attend<Floats16, Floats16, kParts, kWeightParts>(a, w, room, f, nullptr, lo, hi, state, queries);
  } else if constexpr (type == MEMLM_KV_INT8) {
    attend<Codes8, Codes8, 1, 1>(a, w, room, f, nullptr, lo, hi, state, queries);
  } else {
    const int newest = (length - 1) / f.tokens * f.tokens;
    if (lo < newest) {
      const int end = static_cast<int>(least(hi, newest));
      attend<Codes5, Codes4, 1, 1>(a, w, room, f, nullptr, lo, end, state, queries);
    }
    if (hi > newest) {
      const uint8_t* const tail = tail_of(cache, sequence, w.kv_head);
      const int begin = static_cast<int>(most(lo, newest));
      attend<Tail16, Tail16, kParts, kWeightParts>(a, w, room, cache.tail, tail, begin, hi, state, [&] {
        if (lo >= newest) queries();
      });
    }
  }

  float* const sums = reinterpret_cast<float*>(stage);
  const int pitch = f.width + 4, g = lane() / 4, c = lane() % 4;
#pragma unroll
  for (int j = 0; j < tiles; j++) {
    const int tile = warp() + j * kWarps;
    if (tile >= f.width / kKvTile) continue;
#pragma unroll
    for (int n = 0; n < columns; n++) {
      for (int r = 0; r < 4; r++) {
        sums[(n * 8 + 2 * c + r % 2) * pitch + tile * kKvTile + g + r / 2 * 8] = state.sums[j][n][r];
      }
    }
  }
  const int row = thread() / kOfRow, token = (w.first + row) / a.group;
  const int head = w.kv_head * a.group + (w.first + row) % a.group;
  if (row < w.rows && thread() % kOfRow == 0) {
    if (is_split) {
      const int64_t part = part_of(a, sequence, first_row + token, token, head, block_z());
      store(a.totals + 2 * part, Vec2{as_bits(state.maximum), as_bits(state.total)});
    } else {
      room.factors[row] = normaliser(a, head, state.maximum, state.total);
    }
  }
  MEMLM_SYNC_THREADS();
  for (int one = warp(); one < w.rows; one += kWarps) {
    const int its_token = (w.first + one) / a.group;
    const int its_head = w.kv_head * a.group + (w.first + one) % a.group;
    const int64_t its_row = first_row + its_token;
    if (is_split) {
      float* const to = a.sums + part_of(a, sequence, its_row, its_token, its_head, block_z()) * f.width;
      for (int i = lane(); i < f.width; i += kWarp) to[i] = sums[one * pitch + i];
    } else {
      Row<tiles / 2> x = {};
      add_row<tiles / 2>(x, sums + one * pitch, 1, f.width);
      finish<T, tiles / 2>(a, x, room.factors[one], its_row, its_head);
    }
  }
}

// The results of sequences that are shared out: a block for each row and head.
template <class T>
__global__ void __launch_bounds__(kThreads) combine_kernel(const PagedAttention a) {
  const KvCache& cache = a.cache;
  const int width = cache.layout.width, row = block_x(), head = block_y();
  const int sequence = sequence_of(cache.rows, cache.sequences, {1, 1, 0}, row);
  const int64_t first_row = cache.rows[sequence], count = cache.rows[sequence + 1] - first_row;
  if (row >= first_row + count || count > a.split_tokens) return;
  const int token = static_cast<int>(row - first_row);
  const int position = static_cast<int>(cache.lengths[sequence] - count) + token;
  const int lo = a.window && position >= a.window ? position - a.window + 1 : 0;
  const int begin = lo / a.chunk, end = position / a.chunk + 1;
  const int64_t part = part_of(a, sequence, row, token, head, 0);
  // Of maxima and totals a lane has one each, of sums all are asked for at once.
  const bool has = lane() >= begin && lane() < end;
  const Vec2 mine = has ? load<Vec2>(a.totals + 2 * (part + lane())) : Vec2{as_bits(-INFINITY), 0};
  float* const sums = shared<float>();
  const float* const from = a.sums + (part + begin) * width;
  for (int i = thread(); i < (end - begin) * width / 4; i += kThreads) copy_async(sums + 4 * i, from + 4 * i);
  commit_copies();
  float maximum = as_float(mine.x);
  for (int mask = kWarp / 2; mask; mask /= 2) maximum = larger(maximum, shuffle_xor(maximum, mask));
  const float factor = has ? exp2_approx((as_float(mine.x) - maximum) * kLog2E) : 0;
  float total = as_float(mine.y) * factor;
  for (int mask = kWarp / 2; mask; mask /= 2) total += shuffle_xor(total, mask);
  wait_copies<0>();
  MEMLM_SYNC_THREADS();
  if (warp() > 0) return;
  Row<2> x = {};
#pragma unroll 4
  for (int i = begin; i < end; i++) add_row<2>(x, sums + (i - begin) * width, shuffle(factor, i), width);
  finish<T, 2>(a, x, normaliser(a, head, maximum, total), row, head);
}

// ---- The host's side ----

using Kernel = void (*)(PagedAttention);
template <class T, memlm_kv_type type>
Kernel kernel_of(int rows, bool wide) {
  if (rows == 8)
    return wide ? &paged_attention_kernel<T, type, 1, 4> : &paged_attention_kernel<T, type, 1, 2>;
  return wide ? &paged_attention_kernel<T, type, 4, 4> : &paged_attention_kernel<T, type, 4, 2>;
}
template <class T>
Kernel kernel_of(memlm_kv_type type, int rows, bool wide) {
  switch (type) {
    case MEMLM_KV_F32: return kernel_of<T, MEMLM_KV_F32>(rows, wide);
    case MEMLM_KV_BF16: return kernel_of<T, MEMLM_KV_BF16>(rows, wide);
    case MEMLM_KV_INT8: return kernel_of<T, MEMLM_KV_INT8>(rows, wide);
    default: return kernel_of<T, MEMLM_KV_INT4>(rows, wide);
  }
}

template <class K, class V>
int stage_bytes(const KvLayout& f) {
  const int codes =
      K::kStage * (static_cast<int>(round_up(f.channels, 16)) * K::kBits + f.width * V::kBits) / 8;
  return codes + (K::kCoded ? K::kStage * f.groups * 6 : 0);
}
int stage_bytes(memlm_kv_type type, const KvCache& c) {
  switch (type) {
    case MEMLM_KV_F32: return stage_bytes<Floats32, Floats32>(c.layout);
    case MEMLM_KV_BF16: return stage_bytes<Floats16, Floats16>(c.layout);
    case MEMLM_KV_INT8: return stage_bytes<Codes8, Codes8>(c.layout);
    default:
      return static_cast<int>(
          most(stage_bytes<Codes5, Codes4>(c.layout), stage_bytes<Tail16, Tail16>(c.tail)));
  }
}

template <class T>
memlm_status begin(const Gpu& gpu, memlm_kv_type type, int64_t rows, PagedAttention& a, void* stream) {
  const int width = a.cache.layout.width, stage = stage_bytes(type, a.cache);
  const bool coded = type >= MEMLM_KV_INT8, exact = std::is_same_v<T, bf16> || gpu.arch < 800;
  const int parts = type == MEMLM_KV_INT8 ? 0 : coded || !exact ? 2 : 1;  // as kQueryParts
  const int groups = coded ? a.cache.layout.groups : 0;
  a.pitch = static_cast<int>(most(64, 32 * groups)) + 16;
  int tile = rows * a.group > 8 * static_cast<int64_t>(a.cache.sequences) ? 32 : 8, bytes;
  for (;; tile = 8) {
    a.stage_bytes = static_cast<int>(most(stage, tile * (width + 4) * 4));
    const int of_row = (parts + coded) * width * 2 + (lines_of(tile) * a.pitch + 2 + groups) * 4;
    bytes = a.stage_bytes + tile * of_row;
    if (bytes <= gpu.shared_bytes) break;
    if (tile == 8) {
      return fail(MEMLM_UNSUPPORTED, "pool: head_dim = %d needs %d bytes of shared memory, the device has %d",
                  a.cache.layout.dim, bytes, gpu.shared_bytes);
    }
  }
  const Grid grid = {items(rows, a.cache.sequences, {a.group, tile, 1}), a.heads / a.group, a.splits};
  MEMLM_PASS(started(launch(kernel_of<T>(type, tile, width > 128), grid, kThreads, bytes, stream, a)));
  if (a.splits == 1) return MEMLM_OK;
  return started(
      launch(&combine_kernel<T>, {rows, a.heads}, kThreads, a.splits * width * 4, stream, a));
}

}  // namespace
}  // namespace memlm::cuda

using namespace memlm;
using namespace memlm::cuda;

memlm_status memlm_cuda_paged_attention(const memlm_kv_pool* pool, const memlm_sequences* sequences,
                                        const memlm_paged_attention_args* args,
                                        const memlm_cuda_bounds* bounds, memlm_cuda_queue* queue) {
  Gpu gpu;
  MEMLM_PASS(find_gpu(args->dtype, &gpu));
  PagedAttention a = {};
  MEMLM_PASS(kv_cache(pool, sequences, &a.cache));
  MEMLM_PASS(check_bounds(bounds));
  const KvLayout& f = a.cache.layout;
  MEMLM_CHECK(f.dim <= kMostDim, "pool: got head_dim = %d, accepted is 1 to %d", f.dim, kMostDim);
  MEMLM_CHECK(args->heads >= 1 && args->heads % pool->kv_heads == 0 && args->heads <= INT32_MAX,
              "heads: got %lld, expected a multiple of the pool's %lld", static_cast<long long>(args->heads),
              static_cast<long long>(pool->kv_heads));
  MEMLM_CHECK(isfinite(args->scale), "scale: got %g, expected a finite number", args->scale);
  MEMLM_CHECK(args->window >= 0, "window: got %lld, accepted is 0 (none) or above",
              static_cast<long long>(args->window));
  MEMLM_CHECK(args->softcap >= 0 && isfinite(args->softcap), "softcap: got %g, accepted is 0 (none) or above",
              args->softcap);
  if (!sequences->count || !bounds->rows) return MEMLM_OK;
  MEMLM_CHECK(args->q && args->out && is_aligned(args->q, 2) && is_aligned(args->out, 2),
              "q, out: NULL, or not aligned to an element");
  MEMLM_CHECK(args->q_stride >= args->heads * f.dim && args->out_stride >= args->heads * f.dim,
              "q_stride, out_stride: at least heads * head_dim = %lld are needed",
              static_cast<long long>(args->heads * f.dim));
  a.q = args->q, a.out = args->out, a.q_stride = args->q_stride, a.out_stride = args->out_stride;
  a.window = static_cast<int>(least(args->window, INT32_MAX));
  a.scale = args->scale, a.softcap = args->softcap;
  a.slopes = args->slopes, a.sinks = args->sinks;
  a.heads = static_cast<int>(args->heads), a.group = static_cast<int>(args->heads / pool->kv_heads);

  const int64_t longest = bounds->longest ? bounds->longest : sequences->table_stride * f.tokens;
  MEMLM_CHECK(longest <= INT32_MAX, "sequences: got room for %lld tokens in one, accepted is up to %d",
              static_cast<long long>(longest), INT32_MAX);
  a.chunk = static_cast<int>(most(kLeastChunk, round_up(ceil_div(longest, kMostChunks), kLeastChunk)));
  a.splits = static_cast<int>(most(1, ceil_div(longest, a.chunk)));
  a.split_tokens = static_cast<int>(most(1, kSplitRows / a.group));
  a.slots_are_rows = bounds->rows <= sequences->count * a.split_tokens;
  if (a.splits > 1) {
    const int64_t slots = a.slots_are_rows ? bounds->rows : sequences->count * a.split_tokens;
    const int64_t parts = slots * a.heads * a.splits;
    MEMLM_PASS(need(queue, parts * (f.width + 2) * 4));
    a.sums = static_cast<float*>(queue->workspace);
    a.totals = a.sums + parts * f.width;
  }
  return args->dtype == MEMLM_F16 ? begin<f16>(gpu, pool->type, bounds->rows, a, queue->stream)
                                  : begin<bf16>(gpu, pool->type, bounds->rows, a, queue->stream);
}
