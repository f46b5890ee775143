// Exponentials and what is made of them, for every vector of vectors.h.
#pragma once

#include "vectors.h"

namespace {

// c[0] + c[1] x + ... + c[N - 1] x^(N - 1)
template <class V, int N>
typename V::Floats polynomial(typename V::Floats x, const float (&c)[N]) {
  auto y = V::splat(c[N - 1]);
  for (int k = N - 2; k >= 0; --k) y = V::fma(y, x, V::splat(c[k]));
  return y;
}

// e^x = 2^n (1 + rest)
template <class V>
struct Exponential {
  typename V::Floats n, rest;
};

// |r| <= ln(2) / 2 and e^r - 1 = r + r² q(r), a minimax fit; ln 2 in two parts, n times the first is exact. |x| is at
// most 2^21.
template <class V>
Exponential<V> exponential_parts(typename V::Floats x) {
  const auto shift = V::splat(12582912.0f);  // 1.5 2^23: a sum with it is rounded to a whole number
  const auto n = V::fma(x, V::splat(1.44269504f), shift) - shift;
  auto r = V::fma(n, V::splat(-0.693359375f), x);
  r = V::fma(n, V::splat(2.12194440e-4f), r);
  static const float q[] = {0.49999994f, 0.1666652f, 0.041668393f, 0.0083687808f, 0.0013814465f};
  return {n, V::fma(polynomial<V>(r, q), r * r, r)};
}

// e^x from 0 to infinity, for results of dtype D; the polynomials are minimax fits.
//
// fp32: within 2 ulp. Otherwise 2^n 2^f with n + f = x / ln 2: off by 3e-6 and |x| 1e-7, a hundredth of what fp16
// rounds away.
template <class V, pyft_dtype D>
typename V::Floats exponential(typename V::Floats x) {
  if constexpr (D == PYFT_F32) {
    const auto e = exponential_parts<V>(V::clamp(x, -105.0f, 89.0f));
    return V::scale(e.rest + 1.0f, e.n);
  } else {
    const auto parts = V::split(x * 1.44269504f);
    static const float c[] = {1.0f, 0.69312418f, 0.24024099f, 0.055906426f, 0.0095828529f};
    return V::scale(polynomial<V>(parts.rest, c), parts.whole);
  }
}

// 2^x from 0 to infinity: fp32 within 1 ulp, otherwise off by 3e-6.
template <class V, pyft_dtype D>
typename V::Floats exp2(typename V::Floats x) {
  const auto parts = V::split(x);
  if constexpr (D == PYFT_F32) {
    static const float c[] = {1.0f,          0.69314718f,   0.24022648f,   0.055503324f,
                              0.0096184369f, 0.0013398874f, 0.00015353362f};
    return V::scale(polynomial<V>(parts.rest, c), parts.whole);
  } else {
    static const float c[] = {1.0f, 0.69312418f, 0.24024099f, 0.055906426f, 0.0095828529f};
    return V::scale(polynomial<V>(parts.rest, c), parts.whole);
  }
}

// -m / (2 + m) of |x| with m = e^(-2 |x|) - 1, which is accurate for small |x| too.
template <class V>
typename V::Floats tanh(typename V::Floats x) {
  const auto magnitude = x < 0.0f ? -x : x;
  const auto e = exponential_parts<V>(V::clamp(magnitude * -2.0f, -40.0f, 0.0f));
  const auto m = V::scale(e.rest, e.n) + (V::scale(V::splat(1.0f), e.n) - 1.0f);
  const auto y = m / (-2.0f - m);
  return x < 0.0f ? -y : y;
}

}  // namespace
