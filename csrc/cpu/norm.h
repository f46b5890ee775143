// Normalization of rows, with the arithmetic of pyft/reference/norm.py in fp32: a row is read again while it is in the
// cache, so that the variance is the mean of squared deviations.
#pragma once

#include <math.h>

#include "vectors.h"

// One table per instruction set, indexed by pyft_dtype: rows [begin, end). The sums of the backward are added to
// dweight and dbias, fp32 [cols] or NULL.
struct NormKernels {
  void (*forward[3])(const pyft_norm& norm, int64_t begin, int64_t end);
  void (*backward[3])(const pyft_norm_backward& norm, int64_t begin, int64_t end, float* dweight, float* dbias);
};

extern const NormKernels norm_scalar;
#ifdef PYFT_X86
extern const NormKernels norm_avx2;
extern const NormKernels norm_avx512;
extern const NormKernels norm_avx512bf16;
#endif

namespace {

// h - mean; the mean is 0 where the norm is not centered.
template <bool kCentered, class Floats>
Floats centered(Floats h, float mean) {
  return kCentered ? h - mean : h;
}

template <class V, pyft_dtype D, bool kCentered>
void norm_rows(const pyft_norm& norm, int64_t begin, int64_t end) {
  using Floats = typename V::Floats;
  using T = typename Dtype<D>::type;
  const int64_t cols = norm.cols;
  const float count = static_cast<float>(cols), offset = norm.offset;
  const T *weight = static_cast<const T*>(norm.weight), *bias = static_cast<const T*>(norm.bias);
  for (int64_t r = begin; r < end; ++r) {
    const T* h = row_of<D>(norm.x, r, norm.x_stride);
    if (norm.residual) {
      const T *x = h, *residual = row_of<D>(norm.residual, r, norm.residual_stride);
      T* to = row_of<D>(norm.h, r, norm.h_stride);
      for_vectors<V>(cols, [&](auto lanes, int64_t i) {
        lanes.template store<D>(to + i, lanes.template load<D>(x + i) + lanes.template load<D>(residual + i));
      });
      h = to;
    }
    float mean = 0.0f;
    if constexpr (kCentered) {
      const auto sums =
          sum<V, 1>(cols, [&](auto lanes, int64_t i) { return Sums<V, 1>{{lanes.template load<D>(h + i)}}; });
      norm.mean[r] = mean = sums.total(0) / count;
    }
    const auto squares = sum<V, 1>(cols, [&](auto lanes, int64_t i) {
      const Floats x = centered<kCentered>(lanes.template load<D>(h + i), mean);
      return Sums<V, 1>{{x * x}};
    });
    const float rstd = 1.0f / sqrtf(squares.total(0) / count + norm.eps);
    norm.rstd[r] = rstd;
    T* y = row_of<D>(norm.y, r, norm.y_stride);
    for_vectors<V>(cols, [&](auto lanes, int64_t i) {
      Floats x = centered<kCentered>(lanes.template load<D>(h + i), mean) * rstd;
      if (weight) x *= lanes.template load<D>(weight + i) + offset;
      if (bias) x += lanes.template load<D>(bias + i);
      lanes.template store<D>(y + i, x);
    });
  }
}

template <class V, pyft_dtype D, bool kCentered>
void norm_backward_rows(const pyft_norm_backward& norm, int64_t begin, int64_t end, float* dweight, float* dbias) {
  using Floats = typename V::Floats;
  using T = typename Dtype<D>::type;
  const int64_t cols = norm.cols;
  const float count = static_cast<float>(cols), offset = norm.offset;
  const T* weight = static_cast<const T*>(norm.weight);
  for (int64_t r = begin; r < end; ++r) {
    const T *dy = row_of<D>(norm.dy, r, norm.dy_stride), *h = row_of<D>(norm.h, r, norm.h_stride);
    const T* dh = norm.dh ? row_of<D>(norm.dh, r, norm.dh_stride) : nullptr;
    T* dx = row_of<D>(norm.dx, r, norm.dx_stride);
    const float mean = kCentered ? norm.mean[r] : 0.0f, rstd = norm.rstd[r];
    const auto gradient = [&](auto lanes, int64_t i, Floats from) {
      return weight ? from * (lanes.template load<D>(weight + i) + offset) : from;
    };
    const auto normal = [&](auto lanes, int64_t i) {
      return centered<kCentered>(lanes.template load<D>(h + i), mean) * rstd;
    };
    constexpr int kSums = kCentered ? 2 : 1;
    const auto sums = sum<V, kSums>(cols, [&](auto lanes, int64_t i) {
      const Floats g = gradient(lanes, i, lanes.template load<D>(dy + i));
      Sums<V, kSums> terms{{g * normal(lanes, i)}};
      if constexpr (kCentered) terms.of[1] = g;
      return terms;
    });
    const Floats along = V::splat(-sums.total(0) / count);
    const float level = kCentered ? sums.total(kSums - 1) / count : 0.0f;
    for_vectors<V>(cols, [&](auto lanes, int64_t i) {
      const Floats from = lanes.template load<D>(dy + i), x = normal(lanes, i);
      Floats to = V::fma(x, along, centered<kCentered>(gradient(lanes, i, from), level)) * rstd;
      if (dh) to += lanes.template load<D>(dh + i);
      if (dweight) lanes.template store<PYFT_F32>(dweight + i, lanes.template load<PYFT_F32>(dweight + i) + from * x);
      if (dbias) lanes.template store<PYFT_F32>(dbias + i, lanes.template load<PYFT_F32>(dbias + i) + from);
      lanes.template store<D>(dx + i, to);
    });
  }
}

template <class V, pyft_dtype D>
void norm_forward(const pyft_norm& norm, int64_t begin, int64_t end) {
  return norm.mean ? norm_rows<V, D, true>(norm, begin, end) : norm_rows<V, D, false>(norm, begin, end);
}

template <class V, pyft_dtype D>
void norm_backward(const pyft_norm_backward& norm, int64_t begin, int64_t end, float* dweight, float* dbias) {
  return norm.mean ? norm_backward_rows<V, D, true>(norm, begin, end, dweight, dbias)
                   : norm_backward_rows<V, D, false>(norm, begin, end, dweight, dbias);
}

template <class V>
constexpr NormKernels norm_kernels = {
    {norm_forward<V, PYFT_F32>, norm_forward<V, PYFT_F16>, norm_forward<V, PYFT_BF16>},
    {norm_backward<V, PYFT_F32>, norm_backward<V, PYFT_F16>, norm_backward<V, PYFT_BF16>},
};

}  // namespace
