// The small matrix product with AVX512-BF16: products of pairs of bf16, up to 4 x 4 sums of 16 lanes.
#include <immintrin.h>

#include "qlinear.h"

namespace {

__m512bh load32(const uint16_t* x) { return (__m512bh)_mm512_loadu_si512(x); }

template <int kRows>
void multiply_rows(const uint16_t* x, int64_t x_stride, const uint16_t* w, int64_t w_stride, int64_t depth,
                   float* acc) {
  __m512 sum[kRows][kTile];
  for (auto& row : sum) {
    for (auto& lanes : row) lanes = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < depth; k += 32) {
    __m512bh weight[kTile];
    for (int r = 0; r < kTile; ++r) weight[r] = load32(w + r * w_stride + k);
    for (int i = 0; i < kRows; ++i) {
      const __m512bh value = load32(x + i * x_stride + k);
      for (int r = 0; r < kTile; ++r) sum[i][r] = _mm512_dpbf16_ps(sum[i][r], value, weight[r]);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int r = 0; r < kTile; ++r) acc[i * kTile + r] += _mm512_reduce_add_ps(sum[i][r]);
  }
}

void multiply(const void* x, int64_t x_stride, int m, const void* w, int64_t w_stride, int64_t depth, float* acc) {
  const auto* rows = static_cast<const uint16_t*>(x);
  const auto* weight = static_cast<const uint16_t*>(w);
  if (m == 4) return multiply_rows<4>(rows, x_stride, weight, w_stride, depth, acc);
  if (m == 3) return multiply_rows<3>(rows, x_stride, weight, w_stride, depth, acc);
  if (m == 2) return multiply_rows<2>(rows, x_stride, weight, w_stride, depth, acc);
  multiply_rows<1>(rows, x_stride, weight, w_stride, depth, acc);
}

}  // namespace

const Multiply qlinear_avx512bf16 = multiply;
