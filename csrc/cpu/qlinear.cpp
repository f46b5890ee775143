// The linear over a quantized weight for few rows of x: four rows of the weight at a time are decoded into a panel that
// stays in the first-level cache and multiplied with all of x. Each weight is decoded once, whatever m; the decoded
// weight never reaches memory. AMX is not used: no CPU with it was at hand to measure on.
//
//            depth                      x, padded to whole panels, fp32 (bf16 where the CPU multiplies bf16)
//        |<-------->|
//   4 rows  panel   |  decoded, rounded to the dtype; sums in fp32, of each panel in turn
#include "qlinear.h"

#include <string.h>

#include "parallel.h"
#include "quantize.h"

namespace {

constexpr int64_t kDepth = 1024;  // elements of a panel's row
// Multiplications below which a second thread costs more than it brings.
constexpr int64_t kGrain = 1 << 20;

struct Product {
  Multiply multiply;
  bool widen;  // x as fp32
};

Product product_of(pyft_dtype dtype, pyft_isa isa) {
#ifdef PYFT_X86
  if (isa == PYFT_ISA_AVX512 && dtype == PYFT_BF16 && __builtin_cpu_supports("avx512bf16")) {
    return {qlinear_avx512bf16, false};
  }
  if (isa == PYFT_ISA_AVX512) return {qlinear_avx512.multiply[dtype], true};
  if (isa == PYFT_ISA_AVX2) return {qlinear_avx2.multiply[dtype], true};
#endif
  return {qlinear_scalar.multiply[dtype], true};
}

// x [m, cols] -> out [m, padded], zeros behind each row.
template <pyft_dtype D, bool kWiden>
std::vector<char> padded_rows(const void* x, int64_t m, int64_t stride, int64_t cols, int64_t padded) {
  using T = typename Dtype<D>::type;
  using Out = typename Dtype<kWiden ? PYFT_F32 : D>::type;
  std::vector<char> out(m * padded * sizeof(Out));
  auto* rows = reinterpret_cast<Out*>(out.data());
  for (int64_t i = 0; i < m; ++i) {
    const T* from = static_cast<const T*>(x) + i * stride;
    for (int64_t k = 0; k < cols; ++k) {
      if constexpr (kWiden) {
        rows[i * padded + k] = Dtype<D>::load(from[k]);
      } else {
        rows[i * padded + k] = from[k];
      }
    }
  }
  return out;
}

template <pyft_dtype D>
void linear(const void* x, int64_t m, int64_t x_stride, const pyft_weight& w, const void* bias, void* y,
            int64_t y_stride, const Quantize& kernels, Product product, int threads) {
  using T = typename Dtype<D>::type;
  const auto decode = kernels.decode[D][w.bits == 8];
  const int64_t padded = (w.cols + 31) / 32 * 32, item = product.widen ? 4 : sizeof(T);
  const std::vector<char> rows = product.widen ? padded_rows<D, true>(x, m, x_stride, w.cols, padded)
                                               : padded_rows<D, false>(x, m, x_stride, w.cols, padded);
  const auto* addend = static_cast<const T*>(bias);
  const int64_t panels = (w.rows + kTile - 1) / kTile;
  const int64_t work = std::max<int64_t>(1, kTile * w.cols * std::max<int64_t>(m, 8));
  parallel_for(panels, std::max<int64_t>(1, kGrain / work), threads, [&](int64_t begin, int64_t end) {
    alignas(64) T panel[kTile * kDepth];
    std::vector<float> acc(m * kTile);
    for (int64_t p = begin; p < end; ++p) {
      const int64_t count = std::min<int64_t>(kTile, w.rows - p * kTile);
      std::fill(acc.begin(), acc.end(), 0.0f);
      for (int64_t k = 0; k < w.cols; k += kDepth) {
        const int64_t cols = std::min(kDepth, w.cols - k), depth = std::min(kDepth, padded - k);
        if (count < kTile || cols < depth) memset(panel, 0, sizeof panel);
        for (int64_t r = 0; r < count; ++r) {
          const int64_t first = (p * kTile + r) * w.cols + k;
          decode(w, first, first + cols, panel + r * kDepth);
        }
        for (int64_t i = 0; i < m; i += kTile) {
          const int some = static_cast<int>(std::min<int64_t>(kTile, m - i));
          const char* from = rows.data() + (i * padded + k) * item;
          product.multiply(from, padded, some, panel, kDepth, depth, &acc[i * kTile]);
        }
      }
      for (int64_t i = 0; i < m; ++i) {
        T* to = static_cast<T*>(y) + i * y_stride + p * kTile;
        for (int64_t r = 0; r < count; ++r) {
          const float sum = acc[i * kTile + r];
          to[r] = Dtype<D>::store(addend ? sum + Dtype<D>::load(addend[p * kTile + r]) : sum);
        }
      }
    }
  });
}

}  // namespace

pyft_status pyft_cpu_qlinear(const void* x, int64_t m, int64_t x_stride, const pyft_weight* weight, const void* bias,
                             void* y, int64_t y_stride, pyft_dtype dtype, pyft_isa isa, int threads) {
  const pyft_weight& w = *weight;
  if (m < 0 || w.rows < 0 || w.cols < 0 || w.block_size <= 0 || (w.bits != 4 && w.bits != 8)) return PYFT_BAD_ARGUMENT;
  if (m > 1 && (x_stride < w.cols || y_stride < w.rows)) return PYFT_BAD_ARGUMENT;
  const Quantize* kernels = quantize_kernels(isa);
  if (!kernels) return PYFT_BAD_ISA;
  if (dtype < PYFT_F32 || dtype > PYFT_BF16) return PYFT_BAD_ARGUMENT;
  const auto run = dtype == PYFT_F32 ? linear<PYFT_F32> : dtype == PYFT_F16 ? linear<PYFT_F16> : linear<PYFT_BF16>;
  run(x, m, x_stride, w, bias, y, y_stride, *kernels, product_of(dtype, isa), threads);
  return PYFT_OK;
}
