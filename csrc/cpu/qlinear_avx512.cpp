// The small matrix product with AVX-512: up to 4 x 4 sums of 16 lanes.
#include "qlinear.h"
#include "vectors_avx512.h"

namespace {

template <pyft_dtype D, int kRows>
void multiply_rows(const float* x, int64_t x_stride, const typename Dtype<D>::type* w, int64_t w_stride, int64_t depth,
                   float* acc) {
  __m512 sum[kRows][kTile];
  for (auto& row : sum) {
    for (auto& lanes : row) lanes = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < depth; k += 16) {
    __m512 weight[kTile];
    for (int r = 0; r < kTile; ++r) weight[r] = load16<D>(w + r * w_stride + k);
    for (int i = 0; i < kRows; ++i) {
      const __m512 value = _mm512_loadu_ps(x + i * x_stride + k);
      for (int r = 0; r < kTile; ++r) sum[i][r] = _mm512_fmadd_ps(value, weight[r], sum[i][r]);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int r = 0; r < kTile; ++r) acc[i * kTile + r] += _mm512_reduce_add_ps(sum[i][r]);
  }
}

template <pyft_dtype D>
void multiply(const void* x, int64_t x_stride, int m, const void* w, int64_t w_stride, int64_t depth, float* acc) {
  const auto* rows = static_cast<const float*>(x);
  const auto* weight = static_cast<const typename Dtype<D>::type*>(w);
  if (m == 4) return multiply_rows<D, 4>(rows, x_stride, weight, w_stride, depth, acc);
  if (m == 3) return multiply_rows<D, 3>(rows, x_stride, weight, w_stride, depth, acc);
  if (m == 2) return multiply_rows<D, 2>(rows, x_stride, weight, w_stride, depth, acc);
  multiply_rows<D, 1>(rows, x_stride, weight, w_stride, depth, acc);
}

}  // namespace

const Qlinear qlinear_avx512 = {{multiply<PYFT_F32>, multiply<PYFT_F16>, multiply<PYFT_BF16>}};
