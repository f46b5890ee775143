// Eight values of a dtype to and from fp32, with AVX2 and F16C.
#pragma once

#include <immintrin.h>

#include "vectors.h"

namespace {

template <pyft_dtype D>
__m256 load8(const typename Dtype<D>::type* x) {
  if constexpr (D == PYFT_F32) {
    return _mm256_loadu_ps(x);
  } else {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
    if constexpr (D == PYFT_F16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
}

template <pyft_dtype D>
void store8(typename Dtype<D>::type* out, __m256 x) {
  if constexpr (D == PYFT_F32) {
    _mm256_storeu_ps(out, x);
  } else if constexpr (D == PYFT_F16) {
    const __m128i half = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), half);
  } else {
    const __m256i u = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    const __m256 high = _mm256_castsi256_ps(_mm256_srli_epi32(rounded, 16));
    const __m256i half =
        _mm256_castps_si256(_mm256_blendv_ps(high, _mm256_castsi256_ps(_mm256_set1_epi32(0x7FC0)), nan));
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(half, half), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(packed));
  }
}

struct Lanes8 : PlainLanes<Lanes8> {
  static constexpr int kLanes = 8;
  using Floats = __m256;
  using Ints = int32_t __attribute__((vector_size(32)));
  using Wide = uint64_t __attribute__((vector_size(32)));
  using Narrow = uint32_t __attribute__((vector_size(16)));

  template <pyft_dtype D>
  static Floats load(const typename Dtype<D>::type* x) {
    return load8<D>(x);
  }
  template <pyft_dtype D>
  static void store(typename Dtype<D>::type* out, Floats x) {
    store8<D>(out, x);
  }
  static Floats splat(float x) { return _mm256_set1_ps(x); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static Floats clamp(Floats x, float least, float most) {
    return _mm256_max_ps(splat(least), _mm256_min_ps(splat(most), x));  // of NaN and a number the second
  }
  static Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
  static Wide multiply_words(Wide a, uint32_t b) { return (Wide)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b)); }
  static Floats swap_pairs(Floats x) { return _mm256_permute_ps(x, 0xB1); }
};

}  // namespace
