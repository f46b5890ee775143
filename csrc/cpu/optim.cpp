// Optimizers with 8-bit states on CPU: choice of the instruction set, threads over the blocks of all tensors.
#include "optim.h"

#include "parallel.h"

namespace {

// Blocks below which a thread (half a millisecond to start on a small machine) costs more than it brings.
constexpr int64_t kGrain = 1024;

const OptimKernels* kernels_of(pyft_isa isa) {
#ifdef PYFT_X86
  if (isa > pyft_cpu_best_isa()) return nullptr;
  if (isa == PYFT_ISA_AVX512) return __builtin_cpu_supports("avx512vbmi") ? &optim_vbmi : &optim_avx2;
  if (isa == PYFT_ISA_AVX2) return &optim_avx2;
#endif
  return isa == PYFT_ISA_SCALAR ? &optim_scalar : nullptr;
}

int64_t blocks_of(const pyft_optim_tensor& tensor) { return (tensor.n + kOptimBlock - 1) / kOptimBlock; }

}  // namespace

pyft_status pyft_cpu_optim(const pyft_optim_tensor* tensors, int64_t count, pyft_dtype dtype,
                           const pyft_optim_rule* rule, const pyft_optim_maps* maps, pyft_isa isa, int threads) {
  if (count < 0 || dtype < PYFT_F32 || dtype > PYFT_BF16) return PYFT_BAD_ARGUMENT;
  if (rule->algorithm < PYFT_ADAMW || rule->algorithm > PYFT_SGD) return PYFT_BAD_ARGUMENT;
  const OptimKernels* kernels = kernels_of(isa);
  if (!kernels) return PYFT_BAD_ISA;
  if (count == 0) return PYFT_OK;
  OptimScratch scratch;
  kernels->prepare(*maps, scratch);
  const pyft_optim_tensor* last = tensors + count - 1;
  parallel_for(last->block + blocks_of(*last), kGrain, threads, [&](int64_t begin, int64_t end) {
    const auto* tensor = std::upper_bound(tensors, tensors + count, begin,
                                          [](int64_t block, const auto& t) { return block < t.block; }) -
                         1;
    for (; begin < end; ++tensor) {
      const int64_t stop = std::min(end, tensor->block + blocks_of(*tensor));
      kernels->update[dtype](*tensor, begin - tensor->block, stop - tensor->block, *rule, scratch);
      begin = stop;
    }
  });
  return PYFT_OK;
}
