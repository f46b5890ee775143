// The small matrix product with AVX2 and FMA: up to 2 x 4 sums of 8 lanes.
#include "qlinear.h"
#include "vectors_avx2.h"

namespace {

float sum_of(__m256 v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

template <pyft_dtype D, int kRows>
void multiply_rows(const float* x, int64_t x_stride, const typename Dtype<D>::type* w, int64_t w_stride, int64_t depth,
                   float* acc) {
  __m256 sum[kRows][kTile];
  for (auto& row : sum) {
    for (auto& lanes : row) lanes = _mm256_setzero_ps();
  }
  for (int64_t k = 0; k < depth; k += 8) {
    __m256 weight[kTile];
    for (int r = 0; r < kTile; ++r) weight[r] = load8<D>(w + r * w_stride + k);
    for (int i = 0; i < kRows; ++i) {
      const __m256 value = _mm256_loadu_ps(x + i * x_stride + k);
      for (int r = 0; r < kTile; ++r) sum[i][r] = _mm256_fmadd_ps(value, weight[r], sum[i][r]);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int r = 0; r < kTile; ++r) acc[i * kTile + r] += sum_of(sum[i][r]);
  }
}

template <pyft_dtype D>
void multiply(const void* x, int64_t x_stride, int m, const void* w, int64_t w_stride, int64_t depth, float* acc) {
  const auto* rows = static_cast<const float*>(x);
  const auto* weight = static_cast<const typename Dtype<D>::type*>(w);
  for (; m >= 2; m -= 2, rows += 2 * x_stride, acc += 2 * kTile) {
    multiply_rows<D, 2>(rows, x_stride, weight, w_stride, depth, acc);
  }
  if (m) multiply_rows<D, 1>(rows, x_stride, weight, w_stride, depth, acc);
}

}  // namespace

const Qlinear qlinear_avx2 = {{multiply<PYFT_F32>, multiply<PYFT_F16>, multiply<PYFT_BF16>}};
