// Gated activations and plain ones, with the arithmetic of pyft/reference/glu.py in fp32.
#pragma once

#include "functions.h"

// One table per instruction set, indexed by pyft_dtype: rows [begin, end).
struct GluKernels {
  void (*forward[3])(const pyft_glu& glu, int64_t begin, int64_t end);
  void (*backward[3])(const pyft_glu_backward& glu, int64_t begin, int64_t end);
};

extern const GluKernels glu_scalar;
#ifdef PYFT_X86
extern const GluKernels glu_avx2;
extern const GluKernels glu_avx512;
extern const GluKernels glu_avx512bf16;
#endif

namespace {

// The normal distribution at x: its density e^(-x²/2) (not divided by sqrt(2 pi)) and the share below.
template <class V>
struct Normal {
  typename V::Floats density, below;
};

// erfc(z) e^(z²) / 2 with z = |x| / sqrt(2) is a polynomial in t = 1 / (1 + 0.35 |x|), fitted for the least relative
// error, 3e-8, up to x = 14.5, where the share leaves fp32. Neither tail is a difference of large numbers.
template <class V, pyft_dtype D>
Normal<V> normal(typename V::Floats x) {
  const auto magnitude = x < 0.0f ? -x : x;
  const auto t = 1.0f / V::fma(magnitude, V::splat(0.35f), V::splat(1.0f));
  static const float c[] = {0.1396213f,  0.13986348f,  0.119821586f, 0.10555115f,  -0.023208749f,
                            0.15931381f, -0.25583327f, 0.14402783f,  -0.029157188f};
  const auto density = exponential<V, D>(x * x * -0.5f);
  const auto tail = polynomial<V>(t, c) * t * density;
  return {density, x < 0.0f ? tail : 1.0f - tail};
}

// 1 / (1 + e^x), and 1 less that without a difference.
template <class V>
struct Sigmoid {
  typename V::Floats share, rest;
};

template <class V, pyft_dtype D>
Sigmoid<V> sigmoid_of_negative(typename V::Floats x) {
  const auto e = exponential<V, D>(x), share = 1.0f / (1.0f + e);
  return {share, e < 1e30f ? e * share : V::splat(1.0f)};
}

// An activation of g and its derivative.
template <class V>
struct Activated {
  typename V::Floats value, slope;
};

template <class V, pyft_dtype D, pyft_activation A>
Activated<V> activate(typename V::Floats g) {
  if constexpr (A == PYFT_SILU) {
    const auto s = sigmoid_of_negative<V, D>(-g);
    return {g * s.share, s.share * (1.0f + g * s.rest)};
  } else if constexpr (A == PYFT_GELU) {
    const auto n = normal<V, D>(g);
    return {g * n.below, n.below + g * n.density * 0.39894228f};
  } else if constexpr (A == PYFT_GELU_TANH) {            // (1 + tanh u) / 2 is the sigmoid of 2 u
    const auto below = g > 16.0f ? V::splat(16.0f) : g;  // where it has long been 0 or g: g^3 stays finite
    const auto near = below < -16.0f ? V::splat(-16.0f) : below;
    const auto square = near * near;
    const auto s = sigmoid_of_negative<V, D>(near * (square * -0.0713548163f - 1.59576912f));
    return {g * s.share, s.share * (1.0f + near * s.rest * (square * 0.214064449f + 1.59576912f))};
  } else {
    const auto positive = g < 0.0f ? V::splat(0.0f) : g;  // NaN stays
    return {positive * positive, 2.0f * positive};
  }
}

template <class V, pyft_dtype D, pyft_activation A>
void glu_rows(const pyft_glu& glu, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const auto* gate = row_of<D>(glu.gate, r, glu.gate_stride);
    const auto* up = glu.up ? row_of<D>(glu.up, r, glu.up_stride) : nullptr;
    auto* out = row_of<D>(glu.out, r, glu.out_stride);
    for_vectors<V>(glu.cols, [&](auto lanes, int64_t i) {
      auto y = activate<V, D, A>(lanes.template load<D>(gate + i)).value;
      if (up) y *= lanes.template load<D>(up + i);
      lanes.template store<D>(out + i, y);
    });
  }
}

template <class V, pyft_dtype D, pyft_activation A>
void glu_backward_rows(const pyft_glu_backward& glu, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const auto *dy = row_of<D>(glu.dy, r, glu.dy_stride), *gate = row_of<D>(glu.gate, r, glu.gate_stride);
    const auto* up = glu.up ? row_of<D>(glu.up, r, glu.up_stride) : nullptr;
    auto* dgate = row_of<D>(glu.dgate, r, glu.dgate_stride);
    auto* dup = glu.dup ? row_of<D>(glu.dup, r, glu.dup_stride) : nullptr;
    auto* out = glu.out ? row_of<D>(glu.out, r, glu.out_stride) : nullptr;
    for_vectors<V>(glu.cols, [&](auto lanes, int64_t i) {  // all is read before anything is written
      const auto from = lanes.template load<D>(dy + i), factor = up ? lanes.template load<D>(up + i) : V::splat(1.0f);
      const auto a = activate<V, D, A>(lanes.template load<D>(gate + i));
      lanes.template store<D>(dgate + i, from * factor * a.slope);
      if (dup) lanes.template store<D>(dup + i, from * a.value);
      if (out) lanes.template store<D>(out + i, factor * a.value);
    });
  }
}

template <class V, pyft_dtype D>
void glu_forward(const pyft_glu& glu, int64_t begin, int64_t end) {
  switch (glu.activation) {
    case PYFT_SILU:
      return glu_rows<V, D, PYFT_SILU>(glu, begin, end);
    case PYFT_GELU:
      return glu_rows<V, D, PYFT_GELU>(glu, begin, end);
    case PYFT_GELU_TANH:
      return glu_rows<V, D, PYFT_GELU_TANH>(glu, begin, end);
    case PYFT_RELU2:
      return glu_rows<V, D, PYFT_RELU2>(glu, begin, end);
  }
}

template <class V, pyft_dtype D>
void glu_backward(const pyft_glu_backward& glu, int64_t begin, int64_t end) {
  switch (glu.activation) {
    case PYFT_SILU:
      return glu_backward_rows<V, D, PYFT_SILU>(glu, begin, end);
    case PYFT_GELU:
      return glu_backward_rows<V, D, PYFT_GELU>(glu, begin, end);
    case PYFT_GELU_TANH:
      return glu_backward_rows<V, D, PYFT_GELU_TANH>(glu, begin, end);
    case PYFT_RELU2:
      return glu_backward_rows<V, D, PYFT_RELU2>(glu, begin, end);
  }
}

template <class V>
constexpr GluKernels glu_kernels = {
    {glu_forward<V, PYFT_F32>, glu_forward<V, PYFT_F16>, glu_forward<V, PYFT_BF16>},
    {glu_backward<V, PYFT_F32>, glu_backward<V, PYFT_F16>, glu_backward<V, PYFT_BF16>},
};

}  // namespace
