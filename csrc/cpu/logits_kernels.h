// The table of logits.h for one instruction set: the case without scale, cap and the rarer terms has code of its own.
#pragma once

#include "logits_gradient.h"
#include "logits_statistics.h"

namespace {

inline bool is_plain(const pyft_logit_view& view) { return view.scale == 1.0f && view.softcap == 0.0f; }

template <class V, pyft_dtype D>
LogitSums logit_statistics(const pyft_logits& logits, bool more, int64_t r, int64_t begin, int64_t end) {
  if (is_plain(logits.logits)) {
    return more ? logit_sums<V, D, true, true>(logits, r, begin, end)
                : logit_sums<V, D, true, false>(logits, r, begin, end);
  }
  return more ? logit_sums<V, D, false, true>(logits, r, begin, end)
              : logit_sums<V, D, false, false>(logits, r, begin, end);
}

template <class V, pyft_dtype D>
void logit_gradient(const pyft_logits& logits, const pyft_logit_gradient& gradient, int64_t r, int64_t begin,
                    int64_t end) {
  const bool more = gradient.g_smooth || gradient.g_mean || gradient.g_cross || gradient.kept;
  if (is_plain(logits.logits)) {
    return more ? logit_gradient_row<V, D, true, true>(logits, gradient, r, begin, end)
                : logit_gradient_row<V, D, true, false>(logits, gradient, r, begin, end);
  }
  return more ? logit_gradient_row<V, D, false, true>(logits, gradient, r, begin, end)
              : logit_gradient_row<V, D, false, false>(logits, gradient, r, begin, end);
}

template <class V>
float capped_logit(const pyft_logit_view& view, float scaled) {
  return capped_logits<V, false>(view, V::splat(scaled)).u[0];
}

template <class V>
constexpr LogitKernels logit_kernels = {
    {logit_statistics<V, PYFT_F32>, logit_statistics<V, PYFT_F16>, logit_statistics<V, PYFT_BF16>},
    {logit_argmax<V, PYFT_F32>, logit_argmax<V, PYFT_F16>, logit_argmax<V, PYFT_BF16>},
    {logit_gradient<V, PYFT_F32>, logit_gradient<V, PYFT_F16>, logit_gradient<V, PYFT_BF16>},
    capped_logit<V>,
};

}  // namespace
