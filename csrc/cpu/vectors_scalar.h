// Four values of a dtype to and from fp32, on any CPU.
#pragma once

#include "vectors.h"

namespace {

struct Lanes4 : PlainLanes<Lanes4> {
  static constexpr int kLanes = 4;
  using Floats = float __attribute__((vector_size(16)));
  using Ints = int32_t __attribute__((vector_size(16)));
  using Wide = uint64_t __attribute__((vector_size(16)));
  using Narrow = uint32_t __attribute__((vector_size(8)));

  template <pyft_dtype D>
  static Floats load(const typename Dtype<D>::type* x) {
    return Floats{Dtype<D>::load(x[0]), Dtype<D>::load(x[1]), Dtype<D>::load(x[2]), Dtype<D>::load(x[3])};
  }
  template <pyft_dtype D>
  static void store(typename Dtype<D>::type* out, Floats x) {
    for (int i = 0; i < kLanes; ++i) out[i] = Dtype<D>::store(x[i]);
  }
  static Floats splat(float x) { return Floats{x, x, x, x}; }
  static Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
  static Floats clamp(Floats x, float least, float most) {
    return x < least ? splat(least) : x > most ? splat(most) : x;
  }
  static Floats max(Floats a, Floats b) { return a > b ? a : b; }
  static Wide multiply_words(Wide a, uint32_t b) { return Wide{(a[0] & 0xFFFFFFFF) * b, (a[1] & 0xFFFFFFFF) * b}; }
  static Floats swap_pairs(Floats x) { return Floats{x[1], x[0], x[3], x[2]}; }
};

}  // namespace
