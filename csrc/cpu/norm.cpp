// Norms on CPU: choice of the instruction set, threads over rows, or over the parts of a weight's gradient.
#include "norm.h"

#include "parallel.h"

namespace {

const NormKernels* kernels_of(pyft_isa isa) {
#ifdef PYFT_X86
  if (isa > pyft_cpu_best_isa()) return nullptr;
  if (isa == PYFT_ISA_AVX512) return __builtin_cpu_supports("avx512bf16") ? &norm_avx512bf16 : &norm_avx512;
  if (isa == PYFT_ISA_AVX2) return &norm_avx2;
#endif
  return isa == PYFT_ISA_SCALAR ? &norm_scalar : nullptr;
}

bool is_bad(pyft_dtype dtype, int64_t rows, int64_t cols, int64_t out_stride) {
  return dtype < PYFT_F32 || dtype > PYFT_BF16 || rows < 0 || cols < 0 || (rows > 1 && out_stride < cols);
}

}  // namespace

pyft_status pyft_cpu_norm(const pyft_norm* norm, pyft_dtype dtype, pyft_isa isa, int threads) {
  if (is_bad(dtype, norm->rows, norm->cols, norm->y_stride)) return PYFT_BAD_ARGUMENT;
  if (norm->rows > 0 && norm->residual && !norm->h) return PYFT_BAD_ARGUMENT;
  if (norm->rows > 1 && norm->residual && norm->h_stride < norm->cols) return PYFT_BAD_ARGUMENT;
  const NormKernels* kernels = kernels_of(isa);
  if (!kernels) return PYFT_BAD_ISA;
  parallel_rows(norm->rows, norm->cols, threads,
                [&](int64_t begin, int64_t end) { kernels->forward[dtype](*norm, begin, end); });
  return PYFT_OK;
}

pyft_status pyft_cpu_norm_backward(const pyft_norm_backward* norm, pyft_dtype dtype, pyft_isa isa, int threads) {
  if (is_bad(dtype, norm->rows, norm->cols, norm->dx_stride)) return PYFT_BAD_ARGUMENT;
  const NormKernels* kernels = kernels_of(isa);
  if (!kernels) return PYFT_BAD_ISA;
  const int64_t rows = norm->rows, cols = norm->cols, parts = norm->parts;
  if (!norm->dweight && !norm->dbias) {
    parallel_rows(rows, cols, threads,
                  [&](int64_t begin, int64_t end) { kernels->backward[dtype](*norm, begin, end, nullptr, nullptr); });
    return PYFT_OK;
  }
  if (parts < 1) return PYFT_BAD_ARGUMENT;
  const int64_t each = (rows + parts - 1) / parts;
  parallel_rows(parts, std::max<int64_t>(1, each) * cols, threads, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) {
      float* dweight = norm->dweight ? norm->dweight + p * cols : nullptr;
      float* dbias = norm->dbias ? norm->dbias + p * cols : nullptr;
      if (dweight) std::fill_n(dweight, cols, 0.0f);
      if (dbias) std::fill_n(dbias, cols, 0.0f);
      kernels->backward[dtype](*norm, std::min(rows, p * each), std::min(rows, (p + 1) * each), dweight, dbias);
    }
  });
  return PYFT_OK;
}
