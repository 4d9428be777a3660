// The C ABI of attention: checks arguments, calls the kernels in use.
#include "../include/memlm.h"
#include "dispatch.h"

namespace memlm {
namespace {

constexpr int64_t kMostDim = 512;

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
      {"k_len", a.k_len, 0, INT32_MAX},        {"head_dim", a.head_dim, 1, kMostDim},
      {"v_dim", a.v_dim, 1, kMostDim},         {"threads", a.threads, 1, INT32_MAX}};
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
    if (memlm_status s = check_offsets(a.q_offsets, "q_offsets", a.batch, a.q_len)) return s;
    if (memlm_status s = check_offsets(a.k_offsets, "k_offsets", a.batch, a.k_len)) return s;
  }
  if (!(a.scale - a.scale == 0)) return fail(MEMLM_INVALID, "scale: got %g, accepted is a finite one", a.scale);
  if (!(a.softcap >= 0) || a.softcap - a.softcap != 0)
    return fail(MEMLM_INVALID, "softcap: got %g, accepted is 0 or above", a.softcap);
  if (!(a.dropout >= 0 && a.dropout < 1))
    return fail(MEMLM_INVALID, "dropout: got %g, accepted is 0 to below 1", a.dropout);
  return MEMLM_OK;
}

}  // namespace
}  // namespace memlm

using namespace memlm;

memlm_status memlm_attention(const memlm_attention_args* args) {
  if (memlm_status s = check(args)) return s;
  return args->batch && args->q_len ? said(kernels().attention(*args)) : MEMLM_OK;
}
