// The gradient of a row of logits, in its place.
#pragma once

#include "logits.h"

namespace {

// Notes which columns have p >= threshold, or are the label.
template <class V, pyft_dtype D, bool kPlain>
void keep_columns(const pyft_logits& logits, const pyft_logit_gradient& gradient, int64_t r, int64_t begin,
                  int64_t end) {
  constexpr int64_t kChunk = 16 * V::kLanes;
  const auto& view = logits.logits;
  const auto* z = row_of<D>(static_cast<const void*>(view.data), r, view.stride);
  const auto keep = [&](int64_t c) { __atomic_store_n(gradient.kept + c, uint8_t{1}, __ATOMIC_RELAXED); };
  const float lse = gradient.lse[r], least = gradient.threshold > 0.0f ? logf(gradient.threshold) : -INFINITY;
  for (int64_t chunk = begin; chunk < end; chunk += kChunk) {
    const int64_t count = smaller(kChunk, end - chunk);
    float log_p[kChunk];
    auto top = V::splat(-INFINITY);
    for_vectors<V>(count, [&](auto lanes, int64_t i) {
      const auto scaled = scaled_logits<D, kPlain>(view, lanes, z + chunk + i);
      const auto x = capped_logits<V, kPlain>(view, scaled).u - lse;
      lanes.template store<PYFT_F32>(log_p + i, x);
      top = V::max(x, top);
    });
    if (!(largest_lane<V>(top) >= least)) continue;
    for (int64_t i = 0; i < count; ++i) {
      if (log_p[i] >= least) keep(chunk + i);
    }
  }
  const int64_t label = logits.labels[r];
  if (label >= begin && label < end) keep(label);
}

template <class V, pyft_dtype D, bool kPlain, bool kMore>
void logit_gradient_row(const pyft_logits& logits, const pyft_logit_gradient& gradient, int64_t r, int64_t begin,
                        int64_t end) {
  using Floats = typename V::Floats;
  const auto& view = logits.logits;
  auto* z = row_of<D>(view.data, r, view.stride);
  const auto* teacher = teacher_row<D>(logits, r);
  const auto of_row = [&](const float* x) { return kMore && x ? x[r] : 0.0f; };
  const float lse = gradient.lse[r], g_lse = gradient.g_lse[r], g_mean = of_row(gradient.g_mean);
  const float g_smooth = of_row(gradient.g_smooth), g_cross = of_row(gradient.g_cross);
  const float mean = gradient.g_mean ? of_row(gradient.mean) : 0.0f;
  const float teacher_lse = kMore && gradient.g_cross ? logits.teacher_lse[r] : 0.0f;
  const auto step = [&](auto lanes, int64_t c, auto at_label) {
    const auto capped = capped_logits<V, kPlain>(view, scaled_logits<D, kPlain>(view, lanes, z + c));
    const Floats p = exponential<V, D>(capped.u - lse);
    Floats du = p * g_lse;
    if constexpr (kMore) {
      if (gradient.g_mean) du = weighted<V>(p, (1.0f + capped.u - mean) * g_mean + g_lse);
    }
    if constexpr (at_label) du += gradient.g_target[r];
    if constexpr (kMore) {
      if (gradient.g_smooth) {
        du += logits.class_weights ? lanes.template load<PYFT_F32>(logits.class_weights + c) * g_smooth
                                   : V::splat(g_smooth);
      }
      if (gradient.g_cross) du += taught<V, D>(logits, lanes, teacher + c, teacher_lse).q * g_cross;
    }
    if constexpr (!kPlain) du *= capped.slope * view.scale;
    return du;
  };
  if (kMore && gradient.kept) keep_columns<V, D, kPlain>(logits, gradient, r, begin, end);
  const int64_t label = logits.labels[r];
  const bool labelled = label >= begin && label < end;
  const Floats of_label = labelled ? step(Some<V>{1}, label, std::true_type{}) : V::splat(0.0f);
  for_vectors<V>(end - begin, [&](auto lanes, int64_t i) {
    lanes.template store<D>(z + begin + i, step(lanes, begin + i, std::false_type{}));
  });
  if (labelled) Some<V>{1}.template store<D>(z + label, of_label);
}

}  // namespace
