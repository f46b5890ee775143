// An instruction set's table.
#pragma once

#include "attention_bias.h"
#include "attention_forward.h"

namespace {

template <class Kernel>
constexpr AttentionPass pass_of() {
  return {[](const AttentionCall& call, const AttentionItem& item, char* scratch) {
            Arena arena = {scratch};
            Kernel(call, arena, item.sequence->keys).run(item);
          },
          [](const AttentionCall& call, int64_t most_keys) {
            Arena arena = {nullptr};
            const Kernel kernel(call, arena, most_keys);
            return arena.used;
          }};
}

template <class M, pyft_dtype D>
constexpr AttentionKernels::Passes passes_of() {
  return {pass_of<Forward<M, D>>(),   pass_of<ByQuery<M, D>>(),      pass_of<ByKey<M, D>>(),
          pass_of<WholeHead<M, D>>(), pass_of<BiasGradient<M, D>>(), delta_rows<typename M::V, D>};
}

template <class V>
constexpr AttentionKernels attention_kernels = {
    {passes_of<Singles<V>, PYFT_F32>(), passes_of<Singles<V>, PYFT_F16>(), passes_of<Singles<V>, PYFT_BF16>()}};

}  // namespace
