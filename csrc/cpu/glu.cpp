// Activations on CPU: choice of the instruction set, threads over rows.
#include "glu.h"

#include "parallel.h"

namespace {

const GluKernels* kernels_of(pyft_isa isa) {
#ifdef PYFT_X86
  if (isa > pyft_cpu_best_isa()) return nullptr;
  if (isa == PYFT_ISA_AVX512) return __builtin_cpu_supports("avx512bf16") ? &glu_avx512bf16 : &glu_avx512;
  if (isa == PYFT_ISA_AVX2) return &glu_avx2;
#endif
  return isa == PYFT_ISA_SCALAR ? &glu_scalar : nullptr;
}

template <class Glu>
bool is_bad(const Glu& glu, pyft_dtype dtype) {
  return dtype < PYFT_F32 || dtype > PYFT_BF16 || glu.rows < 0 || glu.cols < 0 || glu.activation < PYFT_SILU ||
         glu.activation > PYFT_RELU2;
}

}  // namespace

pyft_status pyft_cpu_glu(const pyft_glu* glu, pyft_dtype dtype, pyft_isa isa, int threads) {
  if (is_bad(*glu, dtype) || (glu->rows > 1 && glu->out_stride < glu->cols)) return PYFT_BAD_ARGUMENT;
  const GluKernels* kernels = kernels_of(isa);
  if (!kernels) return PYFT_BAD_ISA;
  parallel_rows(glu->rows, glu->cols, threads,
                [&](int64_t begin, int64_t end) { kernels->forward[dtype](*glu, begin, end); });
  return PYFT_OK;
}

pyft_status pyft_cpu_glu_backward(const pyft_glu_backward* glu, pyft_dtype dtype, pyft_isa isa, int threads) {
  if (is_bad(*glu, dtype)) return PYFT_BAD_ARGUMENT;
  const int64_t cols = glu->cols;
  if (glu->rows > 1 && (glu->dgate_stride < cols || (glu->dup && glu->dup_stride < cols))) return PYFT_BAD_ARGUMENT;
  if (glu->rows > 1 && glu->out && glu->out_stride < cols) return PYFT_BAD_ARGUMENT;
  const GluKernels* kernels = kernels_of(isa);
  if (!kernels) return PYFT_BAD_ISA;
  parallel_rows(glu->rows, cols, threads,
                [&](int64_t begin, int64_t end) { kernels->backward[dtype](*glu, begin, end); });
  return PYFT_OK;
}
