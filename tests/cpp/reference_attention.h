// Attention and its gradients in double precision by their definition, and how far kernels may be off:
// tests/attention_numerics.py derives the bounds.
#pragma once
#include "reference.h"

namespace reference {

struct AttentionCase {
  int64_t batch, heads, kv_heads, q_len, k_len, dim, v_dim;
  memlm_dtype dtype;
  float scale;
  int64_t left, right;
  int to_end;
  float softcap;
  int mask;  // 0: none, 1: bool, 2: of dtype; [batch, 1, q_len, k_len]
  bool slopes, sinks;
  float dropout;
  uint64_t seed;
  int64_t mask_block = 0;  // of a block mask by head; 0: none

  bool hidden(int64_t h, int64_t i, int64_t j) const {
    return mask_block && (2 * h + 5 * (i / mask_block) + j / mask_block) % 3;
  }
  int64_t q_rows() const { return batch * heads * q_len; }
  int64_t k_rows() const { return batch * kv_heads * k_len; }
};

// lowbias32, and the hash of an element's place, as memlm/ops/attention.py writes them down.
inline uint32_t mix(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352d;
  x = (x ^ x >> 15) * 0x846ca68b;
  return x ^ x >> 16;
}
inline uint32_t dropout_hash(uint64_t seed, int64_t b, int64_t h, int64_t i, int64_t j) {
  uint32_t row = 0;
  for (uint64_t word : {seed & 0xffffffff, seed >> 32, static_cast<uint64_t>(b), static_cast<uint64_t>(h),
                        static_cast<uint64_t>(i)})
    row = mix((row ^ static_cast<uint32_t>(word)) + 0x9e3779b9);
  return mix(row + static_cast<uint32_t>(j) * 0x9e3779b9);
}

struct Bounded {
  Values value, bound;
  explicit Bounded(int64_t count) : value(count), bound(count) {}
  void add(int64_t i, double x, double off) {
    value[i] += x;
    bound[i] += off;
  }
};

struct AttentionResults {
  Bounded out, lse, q, k, v, mask, sinks;
};

// All tensors are dense: q, grad [batch, heads, q_len, .], k, v [batch, kv_heads, k_len, .].
inline AttentionResults attention(const AttentionCase& c, const Values& q, const Values& k, const Values& v,
                                  const Values& mask, const Values& slopes, const Values& sinks,
                                  const Values& grad) {
  const double u = Float(MEMLM_F32).roundoff(), exponential = 6 * u, tanh_off = 8 * u, tiny = 1e-37;
  const Float stored(c.dtype);
  const int64_t keys = c.k_len, group = c.heads / c.kv_heads;
  const auto sum_of = [&](double terms) { return 5 * std::sqrt(terms) * u; };
  AttentionResults r = {Bounded(c.q_rows() * c.v_dim), Bounded(c.q_rows()), Bounded(c.q_rows() * c.dim),
                        Bounded(c.k_rows() * c.dim),   Bounded(c.k_rows() * c.v_dim),
                        Bounded(c.q_rows() * keys),    Bounded(c.heads)};
  const double sums = sum_of(keys + 1) + 2 * u * (1 + keys / (c.mask_block ? 32 : 128));
  const double rows_sum = sum_of(c.q_len * group) + 4 * u;
  for (int64_t row = 0; row < c.q_rows(); ++row) {
    const int64_t i = row % c.q_len, h = row / c.q_len % c.heads, b = row / c.q_len / c.heads;
    const int64_t kv = (b * c.kv_heads + h / group) * keys, at = i + (c.to_end ? keys - c.q_len : 0);
    Values s(keys), off(keys), factor(keys, 1), factor_off(keys), kept(keys, 1), p(keys), off_p(keys);
    double most = c.sinks ? sinks[h] : -INFINITY;
    for (int64_t j = 0; j < keys; ++j) {
      double product = 0, size = 0;
      for (int64_t d = 0; d < c.dim; ++d) {
        const double term = q[row * c.dim + d] * k[(kv + j) * c.dim + d];
        product += term;
        size += std::fabs(term);
      }
      s[j] = c.scale * product;
      off[j] = (sum_of(c.dim) + 4 * u) * std::fabs(c.scale) * size;
      if (c.softcap > 0) {
        const double t = std::tanh(s[j] / c.softcap);
        factor[j] = 1 - t * t;
        factor_off[j] = 2 * (off[j] / c.softcap + tanh_off) + 4 * u;
        s[j] = c.softcap * t;
        off[j] += c.softcap * tanh_off;
      }
      const double distance = std::fabs(static_cast<double>(j - at));
      const double added = c.mask == 2 ? mask[(b * c.q_len + i) * keys + j] : 0;
      const double bias = c.slopes ? slopes[h] * distance : 0;
      s[j] += added - bias;
      off[j] += 3 * u * (std::fabs(s[j]) + bias + std::fabs(added));
      const bool unseen = c.hidden(h, i, j) || (c.left >= 0 && j < at - c.left) || (c.right >= 0 && j > at + c.right) ||
                          (c.mask == 1 && mask[(b * c.q_len + i) * keys + j] == 0);
      if (unseen) s[j] = -INFINITY;
      if (unseen || s[j] == -INFINITY) off[j] = 0;
      if (s[j] > most) most = s[j];
      if (c.dropout > 0) {
        const bool dropped = dropout_hash(c.seed, b, h, i, j) < std::floor(c.dropout * 4294967296.0);
        kept[j] = dropped ? 0 : 1 / (1 - static_cast<double>(c.dropout));
      }
    }
    const bool nothing = most == -INFINITY;
    double sum = c.sinks ? std::exp(sinks[h] - most) : 0;
    for (int64_t j = 0; j < keys && !nothing; ++j) sum += std::exp(s[j] - most);
    const double lse = nothing ? -INFINITY : most + std::log(sum);
    double off_lse = nothing ? 0 : sums + 2 * u * std::fabs(lse);
    for (int64_t j = 0; j < keys; ++j) {
      if (nothing || s[j] == -INFINITY) continue;
      p[j] = std::exp(s[j] - lse);
      off_p[j] = off[j] + 2 * u * std::fabs(s[j] - lse) + exponential;
      off_lse += p[j] * off_p[j];
    }
    for (int64_t j = 0; j < keys; ++j)
      off_p[j] = p[j] * (off_p[j] + off_lse) + (s[j] == -INFINITY ? 0 : tiny);
    r.lse.add(row, lse, off_lse);
    double delta = 0, off_delta = 0;
    for (int64_t d = 0; d < c.v_dim; ++d) {
      double out = 0, out_off = 0;
      for (int64_t j = 0; j < keys; ++j) {
        const double value = v[(kv + j) * c.v_dim + d];
        out += p[j] * kept[j] * value;
        out_off += kept[j] * std::fabs(value) * (off_p[j] + (sums + 4 * u) * p[j]);
      }
      out_off += stored.roundoff() * (std::fabs(out) + out_off) + stored.smallest();
      r.out.add(row * c.v_dim + d, out, out_off);
      const double g = grad[row * c.v_dim + d];
      delta += g * out;
      off_delta += std::fabs(g) * (out_off + sum_of(c.v_dim) * std::fabs(out));
    }
    if (c.sinks) {
      const double share = std::exp(sinks[h] - lse);
      const double off_sink = share * (off_delta + std::fabs(delta) * (off_lse + exponential));
      r.sinks.add(h, -share * delta, off_sink + sum_of(c.batch * c.q_len) * share * std::fabs(delta));
    }
    for (int64_t j = 0; j < keys; ++j) {
      double dp = 0, dp_size = 0;
      for (int64_t d = 0; d < c.v_dim; ++d) {
        const double g = grad[row * c.v_dim + d], term = g * v[(kv + j) * c.v_dim + d];
        dp += term;
        dp_size += std::fabs(term);
        const double weight = p[j] * kept[j];
        r.v.add((kv + j) * c.v_dim + d, weight * g,
                std::fabs(g) * ((off_p[j] + 2 * u * p[j]) * kept[j] + rows_sum * weight));
      }
      dp *= kept[j];
      const double off_dp = (sum_of(c.v_dim) + 4 * u) * dp_size * kept[j];
      const double ds = p[j] * (dp - delta);
      const double off_ds = off_p[j] * std::fabs(dp - delta) + (p[j] + off_p[j]) * (off_dp + off_delta) +
                            4 * u * std::fabs(ds);
      r.mask.add(row * keys + j, ds, off_ds + Float(MEMLM_F32).smallest());
      const double inner = c.scale * ds * factor[j];
      const double off_inner = std::fabs(c.scale) * (off_ds * factor[j] +
                               (std::fabs(ds) + off_ds) * factor_off[j]) + 2 * u * std::fabs(inner);
      for (int64_t d = 0; d < c.dim; ++d) {
        const double x = q[row * c.dim + d], y = k[(kv + j) * c.dim + d];
        r.q.add(row * c.dim + d, inner * y, std::fabs(y) * (off_inner + (sum_of(keys) + 4 * u) * std::fabs(inner)));
        r.k.add((kv + j) * c.dim + d, inner * x, std::fabs(x) * (off_inner + rows_sum * std::fabs(inner)));
      }
    }
  }
  for (Bounded* x : {&r.q, &r.k, &r.v})
    for (size_t i = 0; i < x->value.size(); ++i)
      x->bound[i] += stored.roundoff() * (std::fabs(x->value[i]) + x->bound[i]) + stored.smallest();
  return r;
}

}  // namespace reference
