// silu, as SwiGLU (arXiv:2002.05202) takes it.
#pragma once

namespace memlm {
namespace MEMLM_ISA {

// e^x, to 2 units in the last place (the polynomial of Cephes' expf, S. Moshier); at most 2^127, and 0
// below 2^-126, where f_exp2 of -127 is.  NaN stays NaN: f_min and f_max give their second argument then.
inline F f_exp(F x) {
  x = f_max(f_set1(-88.0f), f_min(f_set1(87.9f), x));
  const I n = f_round(f_mul(x, f_set1(1.44269504f)));
  const F nf = f_from_i(n);  // ln 2 in two parts: the product with the first is exact
  const F r = f_fma(nf, f_set1(2.12194440e-4f), f_fma(nf, f_set1(-0.693359375f), x));
  constexpr float kPolynomial[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                   4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  F p = f_set1(kPolynomial[0]);
  for (int i = 1; i < 6; ++i) p = f_fma(p, r, f_set1(kPolynomial[i]));
  return f_mul(f_add(f_fma(p, f_mul(r, r), r), f_set1(1.0f)), f_exp2(n));
}

inline F silu(F x) { return f_div(x, f_add(f_set1(1.0f), f_exp(f_mul(x, f_set1(-1.0f))))); }

}  // namespace MEMLM_ISA
}  // namespace memlm
