// What the loss takes of logits, and their gradient, with the arithmetic of pyft/reference/logits.py in fp32.
#pragma once

#include <math.h>

#include "functions.h"

constexpr float kLog2E = 1.44269504f;

// Of some columns of a row: the sums of e = 2^(u log2(e) - shift), e u, w u and q u.
struct LogitSums {
  double total, mean, smooth, cross;
  float shift;   // finite, and not far below the largest u log2(e)
  float top;     // the largest scale z that is not NaN
  int64_t from;  // the first column of the block that has it first
};

// One table per instruction set, indexed by pyft_dtype: of row r the columns [begin, end).
struct LogitKernels {
  // `more` than total is asked for.
  LogitSums (*statistics[3])(const pyft_logits& logits, bool more, int64_t r, int64_t begin, int64_t end);
  // The first column from `from` on whose scale z is `top`, or `from`.
  int64_t (*argmax[3])(const pyft_logits& logits, int64_t r, int64_t from, float top);
  void (*gradient[3])(const pyft_logits& logits, const pyft_logit_gradient& gradient, int64_t r, int64_t begin,
                      int64_t end);
  // u of one scale z.
  float (*capped)(const pyft_logit_view& view, float scaled);
};

extern const LogitKernels logits_scalar;
#ifdef PYFT_X86
extern const LogitKernels logits_avx2;
extern const LogitKernels logits_avx512;
extern const LogitKernels logits_avx512bf16;
#endif

namespace {

// std::min and std::max of one file might serve another, for another instruction set.
template <class T>
T smaller(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T larger(T a, T b) {
  return a < b ? b : a;
}

// scale z; kPlain: the scale is 1 and there is no cap.
template <pyft_dtype D, bool kPlain, class Lanes>
auto scaled_logits(const pyft_logit_view& view, Lanes lanes, const typename Dtype<D>::type* z) {
  const auto x = lanes.template load<D>(z);
  if constexpr (kPlain) {
    return x;
  } else {
    return x * view.scale;
  }
}

// u, and its derivative by scale z.
template <class V>
struct Capped {
  typename V::Floats u, slope;
};

template <class V, bool kPlain>
Capped<V> capped_logits(const pyft_logit_view& view, typename V::Floats scaled) {
  if (kPlain || view.softcap == 0.0f) return {scaled, V::splat(1.0f)};
  const auto share = tanh<V>(scaled * (1.0f / view.softcap));
  return {share * view.softcap, 1.0f - share * share};
}

// a b, and 0 where a is.
template <class V>
typename V::Floats weighted(typename V::Floats a, typename V::Floats b) {
  return a == 0.0f ? V::splat(0.0f) : a * b;
}

// The largest lane, none of them NaN.
template <class V>
float largest_lane(typename V::Floats x) {
  float lanes[V::kLanes];
  memcpy(lanes, &x, sizeof lanes);
  float top = lanes[0];
  for (const float lane : lanes) top = larger(top, lane);
  return top;
}

// Row r of the teacher's logits, or null.
template <pyft_dtype D>
const auto* teacher_row(const pyft_logits& logits, int64_t r) {
  const void* z = logits.teacher.data;
  return z ? row_of<D>(z, r, logits.teacher.stride) : nullptr;
}

// The teacher's u at its logits `z`, and q.
template <class V>
struct Taught {
  typename V::Floats u, q;
};

template <class V, pyft_dtype D, class Lanes>
Taught<V> taught(const pyft_logits& logits, Lanes lanes, const typename Dtype<D>::type* z, float lse) {
  const auto u = capped_logits<V, false>(logits.teacher, scaled_logits<D, false>(logits.teacher, lanes, z)).u;
  return {u, exponential<V, PYFT_F32>(u - lse)};
}

}  // namespace
