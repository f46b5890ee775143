// The small matrix product for any CPU.
#include "qlinear.h"

namespace {

template <pyft_dtype D>
void multiply(const void* x, int64_t x_stride, int m, const void* w, int64_t w_stride, int64_t depth, float* acc) {
  const auto* weight = static_cast<const typename Dtype<D>::type*>(w);
  for (int i = 0; i < m; ++i) {
    const float* row = static_cast<const float*>(x) + i * x_stride;
    for (int r = 0; r < kTile; ++r) {
      float sum[8] = {};  // partial sums err less than one long one
      for (int64_t k = 0; k < depth; k += 8) {
        for (int j = 0; j < 8; ++j) sum[j] += row[k + j] * Dtype<D>::load(weight[r * w_stride + k + j]);
      }
      for (float partial : sum) acc[i * kTile + r] += partial;
    }
  }
}

}  // namespace

const Qlinear qlinear_scalar = {{multiply<PYFT_F32>, multiply<PYFT_F16>, multiply<PYFT_BF16>}};
