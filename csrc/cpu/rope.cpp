// Rotary embedding on CPU: choice of the instruction set, threads over tokens.
#include "rope.h"

#include "parallel.h"

namespace {

const RopeKernels* kernels_of(pyft_isa isa) {
#ifdef PYFT_X86
  if (isa > pyft_cpu_best_isa()) return nullptr;
  if (isa == PYFT_ISA_AVX512) return __builtin_cpu_supports("avx512bf16") ? &rope_avx512bf16 : &rope_avx512;
  if (isa == PYFT_ISA_AVX2) return &rope_avx2;
#endif
  return isa == PYFT_ISA_SCALAR ? &rope_scalar : nullptr;
}

}  // namespace

pyft_status pyft_cpu_rope(const pyft_rope* rope, const pyft_heads* q, const pyft_heads* k, pyft_dtype dtype,
                          pyft_isa isa, int threads) {
  if (dtype < PYFT_F32 || dtype > PYFT_BF16) return PYFT_BAD_ARGUMENT;
  if (rope->table_dtype != dtype && rope->table_dtype != PYFT_F32) return PYFT_BAD_ARGUMENT;
  if (rope->batch < 0 || rope->seq < 0 || rope->half < 0 || 2 * rope->half > rope->dim) return PYFT_BAD_ARGUMENT;
  const RopeKernels* kernels = kernels_of(isa);
  if (!kernels) return PYFT_BAD_ISA;
  const int64_t heads = q->heads + (k ? k->heads : 0);
  parallel_rows(rope->batch * rope->seq, heads * rope->dim, threads,
                [&](int64_t begin, int64_t end) { kernels->turn[dtype](*rope, *q, k, begin, end); });
  return PYFT_OK;
}
