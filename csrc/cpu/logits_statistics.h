// What the loss takes of a row of logits. Blocks of columns are summed in fp32 and added up in double; a block is gone
// over again where it has a much larger logit than those before.
#pragma once

#include <float.h>

#include "logits.h"

namespace {

// 2^x off by 1.7e-7, a minimax fit.
template <class V>
typename V::Floats power_of_two(typename V::Floats x) {
  const auto parts = V::split(x);
  static const float c[] = {1.0f, 0.693147004f, 0.240222424f, 0.0555073358f, 0.00967151299f, 0.00132647273f};
  return V::scale(polynomial<V>(parts.rest, c), parts.whole);
}

// The sums of e, e u, w u and q u over some columns, and the largest scale z.
template <class V, int N>
struct LogitBlock {
  typename V::Floats sums[N], top;

  void add(const LogitBlock& more) {
    for (int k = 0; k < N; ++k) sums[k] += more.sums[k];
    top = V::max(more.top, top);
  }

  // The first `count` lanes alone.
  void keep(int count) {
    for (auto& lanes : sums) lanes = first_lanes(lanes, count, 0.0f);
    top = first_lanes(top, count, -INFINITY);
  }

  double total(int k) const { return Sums<V, 1>{{sums[k]}}.total(0); }
  float largest() const { return largest_lane<V>(top); }

 private:
  static typename V::Floats first_lanes(typename V::Floats x, int count, float other) {
    auto kept = V::splat(other);
    memcpy(&kept, &x, sizeof(float) * static_cast<size_t>(count));
    return kept;
  }
};

// The largest scale z among columns [begin, end) of row r; those after the last whole vector do not count.
template <class V, pyft_dtype D, bool kPlain>
float guessed_top(const pyft_logits& logits, int64_t r, int64_t begin, int64_t end) {
  const auto& view = logits.logits;
  const auto* z = row_of<D>(static_cast<const void*>(view.data), r, view.stride);
  auto top = V::splat(-INFINITY);
  for (int64_t c = begin; c + V::kLanes <= end; c += V::kLanes) {
    top = V::max(scaled_logits<D, kPlain>(view, Whole<V>{}, z + c), top);
  }
  return largest_lane<V>(top);
}

// Columns [begin, end) of row r, few enough for sums in fp32.
template <class V, pyft_dtype D, bool kPlain, bool kMore>
LogitBlock<V, kMore ? 4 : 1> logit_block(const pyft_logits& logits, int64_t r, int64_t begin, int64_t end,
                                         float shift) {
  using Floats = typename V::Floats;
  constexpr int kChains = 4;
  using Block = LogitBlock<V, kMore ? 4 : 1>;
  const pyft_logit_view view = logits.logits;
  const auto* z = row_of<D>(static_cast<const void*>(view.data), r, view.stride);
  const auto* teacher = teacher_row<D>(logits, r);
  const float* weights = logits.class_weights;
  const float teacher_lse = kMore && teacher ? logits.teacher_lse[r] : 0.0f;
  const auto step = [=, &logits](auto lanes, int64_t c) {
    const Floats scaled = scaled_logits<D, kPlain>(view, lanes, z + c);
    const Floats u = capped_logits<V, kPlain>(view, scaled).u;
    Block one = {{power_of_two<V>(V::fma(u, V::splat(kLog2E), V::splat(-shift)))}, scaled};
    if constexpr (kMore) {
      one.sums[1] = weighted<V>(one.sums[0], u);
      one.sums[2] = weights ? lanes.template load<PYFT_F32>(weights + c) * u : u;
      one.sums[3] = V::splat(0.0f);
      if (teacher) {
        const auto other = taught<V, D>(logits, lanes, teacher + c, teacher_lse);
        one.sums[3] = weighted<V>(other.q, u - other.u);
      }
    }
    return one;
  };
  Block chains[kChains];
  for (auto& chain : chains) chain = {{}, V::splat(-INFINITY)};
  int64_t c = begin;
  for (; c + kChains * V::kLanes <= end; c += kChains * V::kLanes) {
    for (int k = 0; k < kChains; ++k) chains[k].add(step(Whole<V>{}, c + k * V::kLanes));
  }
  for (; c + V::kLanes <= end; c += V::kLanes) chains[0].add(step(Whole<V>{}, c));
  if (c < end) {
    const int count = static_cast<int>(end - c);
    Block last = step(Some<V>{count}, c);
    last.keep(count);
    chains[1].add(last);
  }
  chains[0].add(chains[1]);
  chains[2].add(chains[3]);
  chains[0].add(chains[2]);
  return chains[0];
}

template <class V, pyft_dtype D, bool kPlain, bool kMore>
LogitSums logit_sums(const pyft_logits& logits, int64_t r, int64_t begin, int64_t end) {
  constexpr int64_t kBlock = 128 * V::kLanes;  // 32 terms in each chain of fp32 sums
  constexpr float kStep = 1.0f;                // how far above the shift a u may be: more would cost accuracy
  const auto shift_for = [&](float top) {
    const float u = capped_logits<V, kPlain>(logits.logits, V::splat(top)).u[0];
    return smaller(larger(u * kLog2E, -FLT_MAX), FLT_MAX);
  };
  LogitSums found = {0.0, 0.0, 0.0, 0.0, -FLT_MAX, -INFINITY, begin};
  for (int64_t from = begin; from < end; from += kBlock) {
    const int64_t to = smaller(from + kBlock, end);
    if (from == begin) found.shift = shift_for(guessed_top<V, D, kPlain>(logits, r, from, to));
    auto block = logit_block<V, D, kPlain, kMore>(logits, r, from, to, found.shift);
    const float top = block.largest(), shift = shift_for(top);
    if (shift > found.shift + kStep) {
      const double shrunk = ::exp2(static_cast<double>(found.shift) - shift);
      found.total *= shrunk, found.mean *= shrunk, found.shift = shift;
      block = logit_block<V, D, kPlain, kMore>(logits, r, from, to, shift);
    }
    if (top > found.top) found.top = top, found.from = from;
    found.total += block.total(0);
    if constexpr (kMore) found.mean += block.total(1), found.smooth += block.total(2), found.cross += block.total(3);
  }
  return found;
}

template <class V, pyft_dtype D>
int64_t logit_argmax(const pyft_logits& logits, int64_t r, int64_t from, float top) {
  constexpr int64_t kChunk = 16 * V::kLanes;
  const auto& view = logits.logits;
  const auto* z = row_of<D>(static_cast<const void*>(view.data), r, view.stride);
  for (int64_t chunk = from; chunk < logits.cols; chunk += kChunk) {
    const int64_t count = smaller(kChunk, logits.cols - chunk);
    auto hits = V::splat(0.0f);
    for_vectors<V>(count, [&](auto lanes, int64_t i) {
      const auto hit = scaled_logits<D, false>(view, lanes, z + chunk + i) == top;
      hits = hit ? V::splat(1.0f) : hits;
    });
    if (largest_lane<V>(hits) == 0.0f) continue;
    for (int64_t c = chunk; c < chunk + count; ++c) {
      if (Dtype<D>::load(z[c]) * view.scale == top) return c;
    }
  }
  return from;
}

}  // namespace
