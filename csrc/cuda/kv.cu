#include "kv.h"

#include <math.h>

namespace memlm::cuda {
namespace {

KvLayout layout_of(const KvBlock& b) {
  return {static_cast<int>(b.tokens), static_cast<int>(b.dim), static_cast<int>(b.channels),
          static_cast<int>(b.width), static_cast<int>(b.group), static_cast<int>(b.groups()),
          b.key_bits(), b.value_bits(), static_cast<int>(b.key_tile()), static_cast<int>(b.value_tile()),
          b.values(), b.key_scales(), b.value_scales(), b.bytes()};
}

}  // namespace

memlm_status kv_cache(const memlm_kv_pool* pool, const memlm_sequences* s, KvCache* cache) {
  MEMLM_CHECK(pool && s, "pool, sequences: NULL");
  MEMLM_CHECK(pool->type >= MEMLM_KV_F32 && pool->type <= MEMLM_KV_INT4, "pool: got type %d", pool->type);
  MEMLM_CHECK(pool->block_tokens >= 32 && pool->block_tokens <= kMostKvTokens && pool->block_tokens % 32 == 0,
              "pool: got block_tokens = %lld, accepted are multiples of 32 to 256",
              static_cast<long long>(pool->block_tokens));
  MEMLM_CHECK(pool->head_dim >= 1 && pool->head_dim <= kMostHeadDim,
              "pool: got head_dim = %lld, accepted is 1 to 512", static_cast<long long>(pool->head_dim));
  MEMLM_CHECK(pool->kv_heads >= 1 && pool->kv_heads <= 65535,
              "pool: got kv_heads = %lld, accepted is 1 to 65535", static_cast<long long>(pool->kv_heads));
  MEMLM_CHECK(kv_has_tails(pool->type) == (pool->tails != nullptr),
              "pool: int4 has tails, other types have not");
  MEMLM_CHECK(is_aligned(pool->blocks, 16) && is_aligned(pool->tails, 16),
              "pool: blocks and tails must be 16-byte aligned");
  MEMLM_CHECK(s->count >= 0 && s->count <= INT32_MAX, "sequences: got count = %lld",
              static_cast<long long>(s->count));
  MEMLM_CHECK(!s->count || (pool->blocks && s->rows && s->lengths && s->tables && (!pool->tails || s->tails)),
              "pool, sequences: an array is NULL");
  const KvBlock block(pool->type, pool->block_tokens, pool->head_dim);
  const int piece = kv_is_quantized(pool->type) ? static_cast<int>(block.width & -block.width) : 1;
  *cache = {static_cast<uint8_t*>(pool->blocks), static_cast<uint8_t*>(pool->tails), pool->count,
            pool->tail_count, layout_of(block), layout_of(kv_tail(block)), piece,
            1 / sqrtf(static_cast<float>(piece)), s->rows, s->lengths, s->tables, s->tails, s->table_stride,
            static_cast<int>(s->count)};
  return MEMLM_OK;
}

memlm_status check_bounds(const memlm_cuda_bounds* bounds) {
  MEMLM_CHECK(bounds, "bounds: NULL");
  MEMLM_CHECK(bounds->rows >= 0 && bounds->rows <= INT32_MAX,
              "bounds: got rows = %lld, accepted is 0 to 2^31 - 1", static_cast<long long>(bounds->rows));
  MEMLM_CHECK(bounds->longest >= 0, "bounds: got longest = %lld, accepted is 0 (the tables' size) or above",
              static_cast<long long>(bounds->longest));
  return MEMLM_OK;
}

}  // namespace memlm::cuda
