// The C ABI of attention: checks arguments, calls the kernels in use.
#include "../include/memlm.h"

#include <initializer_list>

#include "../kv_blocks.h"
#include "dispatch.h"
#include "threads.h"

namespace memlm {
namespace {

using ll = long long;

memlm_status check_offsets(const int64_t* offsets, const char* name, int64_t count, int64_t total) {
  if (offsets[0] != 0) return fail(MEMLM_INVALID, "%s: begins with %lld, not 0", name, (ll)offsets[0]);
  for (int64_t i = 0; i < count; ++i)
    if (offsets[i + 1] < offsets[i])
      return fail(MEMLM_INVALID, "%s: %lld after %lld; they must ascend", name, (ll)offsets[i + 1],
                  (ll)offsets[i]);
  if (offsets[count] != total)
    return fail(MEMLM_INVALID, "%s: ends with %lld, there are %lld rows", name, (ll)offsets[count],
                (ll)total);
  return MEMLM_OK;
}

memlm_status check(const memlm_attention_args* args) {
  if (!args) return fail(MEMLM_INVALID, "args: is NULL");
  const memlm_attention_args& a = *args;
  const struct { const char* name; int64_t value, least, most; } sizes[] = {
      {"batch", a.batch, 0, INT32_MAX},        {"heads", a.heads, 1, INT32_MAX},
      {"kv_heads", a.kv_heads, 1, INT32_MAX},  {"q_len", a.q_len, 0, INT32_MAX},
      {"k_len", a.k_len, 0, INT32_MAX},        {"head_dim", a.head_dim, 1, kMostHeadDim},
      {"v_dim", a.v_dim, 1, kMostHeadDim},         {"threads", a.threads, 1, INT32_MAX}};
  for (const auto& size : sizes)
    if (size.value < size.least || size.value > size.most)
      return fail(MEMLM_INVALID, "%s: got %lld, accepted is %lld to %lld", size.name, (ll)size.value,
                  (ll)size.least, (ll)size.most);
  if (a.heads % a.kv_heads)
    return fail(MEMLM_INVALID, "heads: %lld are no multiple of %lld kv_heads", (ll)a.heads,
                (ll)a.kv_heads);
  if (!is_dtype(a.dtype))
    return fail(MEMLM_INVALID, "dtype: got %d, accepted are f32, f16, bf16", a.dtype);
  const struct { const char* name; const void* p; bool needed; } arrays[] = {
      {"q", a.q, a.batch && a.q_len}, {"k", a.k, a.batch && a.k_len}, {"v", a.v, a.batch && a.k_len},
      {"out", a.out, a.batch && a.q_len}, {"lse", a.lse, a.batch && a.q_len}};
  for (const auto& array : arrays)
    if (array.needed && !array.p) return fail(MEMLM_INVALID, "%s: is NULL", array.name);
  if (!a.q_offsets != !a.k_offsets)
    return fail(MEMLM_INVALID, "q_offsets, k_offsets: one is NULL, the other is not");
  if (a.q_offsets) {
    if (a.mask) return fail(MEMLM_INVALID, "mask: is not for sequences with offsets");
    if (a.block_mask) return fail(MEMLM_INVALID, "block_mask: is not for sequences with offsets");
    if (memlm_status s = check_offsets(a.q_offsets, "q_offsets", a.batch, a.q_len)) return s;
    if (memlm_status s = check_offsets(a.k_offsets, "k_offsets", a.batch, a.k_len)) return s;
  }
  if (a.block_mask && (a.mask_block < 32 || a.mask_block > INT32_MAX || a.mask_block % 32))
    return fail(MEMLM_INVALID, "mask_block: got %lld, accepted are multiples of 32", (ll)a.mask_block);
  if (!(a.scale - a.scale == 0))
    return fail(MEMLM_INVALID, "scale: got %g, accepted is a finite one", a.scale);
  if (!(a.softcap >= 0) || a.softcap - a.softcap != 0)
    return fail(MEMLM_INVALID, "softcap: got %g, accepted is 0 or above", a.softcap);
  if (!(a.dropout >= 0 && a.dropout < 1))
    return fail(MEMLM_INVALID, "dropout: got %g, accepted is 0 to below 1", a.dropout);
  return MEMLM_OK;
}

memlm_status check(const memlm_kv_pool* pool, const memlm_sequences* s) {
  if (!pool) return fail(MEMLM_INVALID, "pool: is NULL");
  if (!s) return fail(MEMLM_INVALID, "sequences: is NULL");
  if (pool->kv_heads < 1 || pool->kv_heads > INT32_MAX)
    return fail(MEMLM_INVALID, "kv_heads: got %lld, accepted is 1 to 2^31-1", (ll)pool->kv_heads);
  if (!memlm_kv_block_bytes(pool->type, pool->block_tokens, pool->head_dim))
    return fail(MEMLM_INVALID,
                "type, block_tokens, head_dim: got %d, %lld, %lld, accepted are 0 to 3, multiples of "
                "32 to %lld, 1 to %lld",
                pool->type, (ll)pool->block_tokens, (ll)pool->head_dim, (ll)kMostKvTokens,
                (ll)kMostHeadDim);
  if (s->count < 0 || s->count > INT32_MAX)
    return fail(MEMLM_INVALID, "count: got %lld, accepted is 0 to 2^31-1", (ll)s->count);
  if (s->count && (!s->rows || !s->lengths || !s->tables))
    return fail(MEMLM_INVALID, "rows, lengths, tables: one is NULL");
  if (!pool->tails != !kv_has_tails(pool->type))
    return fail(MEMLM_INVALID, "tails: %s", pool->tails ? "only INT4 has them" : "is NULL, INT4 needs them");
  if (pool->tails && s->count && !s->tails) return fail(MEMLM_INVALID, "sequences: tails is NULL");
  for (int64_t i = 0; pool->tails && i < s->count; ++i)
    if (s->tails[i] < 0 || s->tails[i] >= pool->tail_count)
      return fail(MEMLM_INVALID, "tails: number %lld is %d, the pool has %lld", (ll)i, s->tails[i],
                  (ll)pool->tail_count);
  if (s->count && s->rows[0] != 0)
    return fail(MEMLM_INVALID, "rows: begins with %lld, not 0", (ll)s->rows[0]);
  return MEMLM_OK;
}

// That tokens first(i) .. lengths[i] - 1 of each sequence i are in blocks of the pool.
template <class First>
memlm_status check_tables(const memlm_kv_pool& pool, const memlm_sequences& s, const First& first) {
  for (int64_t i = 0; i < s.count; ++i) {
    const int64_t rows = s.rows[i + 1] - s.rows[i], length = s.lengths[i];
    if (rows < 0 || rows > length || length > INT32_MAX)
      return fail(MEMLM_INVALID, "rows, lengths: sequence %lld has %lld new of %lld tokens", (ll)i,
                  (ll)rows, (ll)length);
    if (rows == 0) continue;
    if ((length - 1) / pool.block_tokens >= s.table_stride)
      return fail(MEMLM_INVALID, "tables: %lld blocks do not hold the %lld tokens of sequence %lld",
                  (ll)s.table_stride, (ll)length, (ll)i);
    for (int64_t b = first(length - rows) / pool.block_tokens; b <= (length - 1) / pool.block_tokens; ++b) {
      const int32_t block = s.tables[i * s.table_stride + b];
      if (block < 0 || block >= pool.count)
        return fail(MEMLM_INVALID, "tables: block %lld of sequence %lld is %d, the pool has %lld",
                    (ll)b, (ll)i, block, (ll)pool.count);
    }
  }
  if (s.count && s.rows[s.count] > 0 && !pool.blocks) return fail(MEMLM_INVALID, "blocks: is NULL");
  return MEMLM_OK;
}

}  // namespace

memlm_status check_paged(const memlm_kv_pool* pool, const memlm_sequences* sequences, int64_t window) {
  if (memlm_status s = check(pool, sequences)) return s;
  return check_tables(*pool, *sequences, [window](int64_t before) {
    return window && before >= window ? before - window + 1 : 0;
  });
}

}  // namespace memlm

using namespace memlm;

memlm_status memlm_attention(const memlm_attention_args* args) {
  if (memlm_status s = check(args)) return s;
  return args->batch && args->q_len ? said(kernels().attention(*args)) : MEMLM_OK;
}

memlm_status memlm_attention_backward(const memlm_attention_args* args,
                                      const memlm_attention_grads* grads) {
  if (memlm_status s = check(args)) return s;
  if (!grads) return fail(MEMLM_INVALID, "grads: is NULL");
  const memlm_attention_args& a = *args;
  const struct { const char* name; const void* p; bool needed; } arrays[] = {
      {"grad_out", grads->grad_out, a.batch && a.q_len}, {"grad_q", grads->grad_q, a.batch && a.q_len},
      {"grad_k", grads->grad_k, a.batch && a.k_len}, {"grad_v", grads->grad_v, a.batch && a.k_len}};
  for (const auto& array : arrays)
    if (array.needed && !array.p) return fail(MEMLM_INVALID, "%s: is NULL", array.name);
  if (grads->grad_mask && a.q_offsets)
    return fail(MEMLM_INVALID, "grad_mask: is not for sequences with offsets");
  if (grads->grad_sinks && !a.sinks) return fail(MEMLM_INVALID, "grad_sinks: there are no sinks");
  return said(kernels().attention_backward(a, *grads));
}

int64_t memlm_kv_block_bytes(memlm_kv_type type, int64_t block_tokens, int64_t head_dim) {
  if (type < MEMLM_KV_F32 || type > MEMLM_KV_INT4) return 0;
  if (block_tokens < 32 || block_tokens > kMostKvTokens || block_tokens % 32) return 0;
  if (head_dim < 1 || head_dim > kMostHeadDim) return 0;
  return KvBlock(type, block_tokens, head_dim).bytes();
}

int64_t memlm_kv_tail_bytes(memlm_kv_type type, int64_t block_tokens, int64_t head_dim) {
  if (!memlm_kv_block_bytes(type, block_tokens, head_dim) || !kv_has_tails(type)) return 0;
  return kv_tail(KvBlock(type, block_tokens, head_dim)).bytes();
}

memlm_status memlm_kv_append(const memlm_kv_pool* pool, const memlm_sequences* sequences, const void* k,
                             const void* v, int64_t stride, memlm_dtype dtype, int threads) {
  if (memlm_status s = check(pool, sequences)) return s;
  if (memlm_status s = check_tables(*pool, *sequences, [](int64_t before) { return before; })) return s;
  const int64_t rows = sequences->count ? sequences->rows[sequences->count] : 0;
  if (rows && (!k || !v)) return fail(MEMLM_INVALID, "%s: is NULL", k ? "v" : "k");
  if (stride < pool->kv_heads * pool->head_dim)
    return fail(MEMLM_INVALID, "stride: got %lld, rows have %lld numbers", (ll)stride,
                (ll)(pool->kv_heads * pool->head_dim));
  if (!is_dtype(dtype)) return fail(MEMLM_INVALID, "dtype: got %d, accepted are f32, f16, bf16", dtype);
  if (threads < 1) return fail(MEMLM_INVALID, "threads: got %d, at least 1 is needed", threads);
  // Some nanoseconds a number, as a handful of multiply-adds.
  const double numbers = 2.0 * rows * pool->kv_heads * pool->head_dim;
  kernels().kv_append(*pool, *sequences, k, v, stride, dtype, useful_threads(numbers * 8, threads));
  return MEMLM_OK;
}

memlm_status memlm_paged_attention(const memlm_kv_pool* pool, const memlm_sequences* sequences,
                                   const memlm_paged_attention_args* args) {
  if (!args) return fail(MEMLM_INVALID, "args: is NULL");
  const memlm_paged_attention_args& a = *args;
  if (a.window < 0) return fail(MEMLM_INVALID, "window: got %lld, accepted is 0 or above", (ll)a.window);
  if (memlm_status s = check_paged(pool, sequences, a.window)) return s;
  if (a.heads < 1 || a.heads > INT32_MAX || a.heads % pool->kv_heads)
    return fail(MEMLM_INVALID, "heads: got %lld, accepted are multiples of %lld kv_heads", (ll)a.heads,
                (ll)pool->kv_heads);
  const int64_t rows = sequences->count ? sequences->rows[sequences->count] : 0;
  if (rows && (!a.q || !a.out)) return fail(MEMLM_INVALID, "%s: is NULL", a.q ? "out" : "q");
  for (const int64_t stride : {a.q_stride, a.out_stride})
    if (stride < a.heads * pool->head_dim)
      return fail(MEMLM_INVALID, "q_stride, out_stride: got %lld, rows have %lld numbers", (ll)stride,
                  (ll)(a.heads * pool->head_dim));
  if (!is_dtype(a.dtype))
    return fail(MEMLM_INVALID, "dtype: got %d, accepted are f32, f16, bf16", a.dtype);
  if (!(a.scale - a.scale == 0))
    return fail(MEMLM_INVALID, "scale: got %g, accepted is a finite one", a.scale);
  if (!(a.softcap >= 0) || a.softcap - a.softcap != 0)
    return fail(MEMLM_INVALID, "softcap: got %g, accepted is 0 or above", a.softcap);
  if (a.threads < 1) return fail(MEMLM_INVALID, "threads: got %d, at least 1 is needed", a.threads);
  if (rows == 0) return MEMLM_OK;
  double macs = 0;
  for (int64_t i = 0; i < sequences->count; ++i)
    macs += 2.0 * (sequences->rows[i + 1] - sequences->rows[i]) * sequences->lengths[i];
  memlm_paged_attention_args useful = a;
  useful.threads = useful_threads(macs * a.heads * pool->head_dim, a.threads);
  return said(kernels().paged_attention(*pool, *sequences, useful));
}
