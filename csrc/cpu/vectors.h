// Loops over rows of any length for kernels that are written once for every instruction set. `V` is a vector of fp32
// (Lanes4, Lanes8, Lanes16): GCC's vectors, which have the operators of C, with
//
//   load<D>, store<D>            kLanes elements of a dtype
//   load_some<D>, store_some<D>  the first `count` < kLanes; the other lanes are 0
//   splat, fma, scale            fma: rounded once where the instruction set can; scale(x, n): x 2^n, n whole
//   clamp                        between two bounds; NaN stays
//   max                          of NaN and a number the second
//   split                        into a whole number and the rest, |rest| <= 1/2; 2^whole is right, however large it is
//   multiply_words               of lanes of 64 bits the lower 32 times a number; Narrow has their lower 32
//   swap_pairs                   lanes 1, 0, 3, 2, ...
#pragma once

#include <type_traits>

#include "convert.h"

namespace {

// All lanes of a vector, or the first `count`.
template <class V>
struct Whole {
  template <pyft_dtype D>
  typename V::Floats load(const typename Dtype<D>::type* x) const {
    return V::template load<D>(x);
  }
  template <pyft_dtype D>
  void store(typename Dtype<D>::type* out, typename V::Floats x) const {
    V::template store<D>(out, x);
  }
};

template <class V>
struct Some {
  int count;
  template <pyft_dtype D>
  typename V::Floats load(const typename Dtype<D>::type* x) const {
    return V::template load_some<D>(x, count);
  }
  template <pyft_dtype D>
  void store(typename Dtype<D>::type* out, typename V::Floats x) const {
    V::template store_some<D>(out, x, count);
  }
};

// step(lanes, i) for each vector of n elements; `lanes` loads and stores at i.
template <class V, class Step>
void for_vectors(int64_t n, const Step& step) {
  int64_t i = 0;
  for (; i + V::kLanes <= n; i += V::kLanes) step(Whole<V>{}, i);
  if (i < n) step(Some<V>{static_cast<int>(n - i)}, i);
}

// N sums at once.
template <class V, int N>
struct Sums {
  typename V::Floats of[N];
  void operator+=(const Sums& other) {
    for (int k = 0; k < N; ++k) of[k] += other.of[k];
  }
  float total(int k) const {
    float lanes[V::kLanes];
    memcpy(lanes, &of[k], sizeof lanes);
    for (int width = V::kLanes / 2; width; width /= 2) {
      for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    }
    return lanes[0];
  }
};

// The sums of term(lanes, i) over the vectors of n elements. Blocks of 32 vectors are summed apart, or what is lost to
// rounding would grow with n.
template <class V, int N, class Term>
Sums<V, N> sum(int64_t n, const Term& term) {
  constexpr int64_t kChains = 4, kBlock = 32 * V::kLanes;
  Sums<V, N> all{};
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    Sums<V, N> chains[kChains]{};
    for (int64_t j = i; j < i + kBlock; j += kChains * V::kLanes) {
      for (int64_t k = 0; k < kChains; ++k) chains[k] += term(Whole<V>{}, j + k * V::kLanes);
    }
    chains[0] += chains[1];
    chains[2] += chains[3];
    chains[0] += chains[2];
    all += chains[0];
  }
  Sums<V, N> rest{};
  for (; i + V::kLanes <= n; i += V::kLanes) rest += term(Whole<V>{}, i);
  if (i < n) {
    const int count = static_cast<int>(n - i);
    Sums<V, N> last = term(Some<V>{count}, i);
    for (auto& lanes : last.of) {
      float kept[V::kLanes] = {};
      memcpy(kept, &lanes, sizeof(float) * static_cast<size_t>(count));
      memcpy(&lanes, kept, sizeof kept);
    }
    rest += last;
  }
  all += rest;
  return all;
}

// Row r of a matrix of a dtype.
template <pyft_dtype D, class Void>
auto* row_of(Void* matrix, int64_t r, int64_t stride) {
  using T = typename Dtype<D>::type;
  if constexpr (std::is_const_v<Void>) {
    return static_cast<const T*>(matrix) + r * stride;
  } else {
    return static_cast<T*>(matrix) + r * stride;
  }
}

// A number in two parts.
template <class V>
struct Parts {
  typename V::Floats whole, rest;
};

// What instruction sets without an instruction for it have: loads and stores of the first lanes through memory, x 2^n
// by two factors (2^n itself may be out of range), whole numbers by addition.
template <class V>
struct PlainLanes {
  template <pyft_dtype D>
  static auto load_some(const typename Dtype<D>::type* x, int count) {
    typename Dtype<D>::type values[V::kLanes] = {};
    memcpy(values, x, sizeof *x * static_cast<size_t>(count));
    return V::template load<D>(values);
  }

  template <pyft_dtype D, class Floats>
  static void store_some(typename Dtype<D>::type* out, Floats x, int count) {
    typename Dtype<D>::type values[V::kLanes];
    V::template store<D>(values, x);
    memcpy(out, values, sizeof *out * static_cast<size_t>(count));
  }

  static constexpr float kShift = 12582912.0f;  // 1.5 2^23: what is added to it is rounded to its last bits, n

  template <class Floats>
  static Parts<V> split(Floats x) {
    x = V::clamp(x, -160.0f, 160.0f);
    const Floats whole = (x + kShift) - kShift;
    return {whole, x - whole};
  }

  template <class Floats>
  static Floats scale(Floats x, Floats n) {
    using Ints = typename V::Ints;
    const Ints whole = (Ints)(n + kShift) - (Ints)V::splat(kShift), half = whole >> 1;
    return x * (Floats)((half + 127) << 23) * (Floats)((whole - half + 127) << 23);
  }
};

}  // namespace
