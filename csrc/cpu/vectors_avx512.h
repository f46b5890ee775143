// Sixteen values of a dtype to and from fp32, with AVX-512.
#pragma once

#include <immintrin.h>

#include "vectors.h"

namespace {

// 16 values of a 16-bit dtype as fp32.
template <pyft_dtype D>
__m512 widen16(__m256i half) {
  if constexpr (D == PYFT_F16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

template <pyft_dtype D>
__m512 load16(const typename Dtype<D>::type* x) {
  if constexpr (D == PYFT_F32) {
    return _mm512_loadu_ps(x);
  } else {
    return widen16<D>(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  }
}

// 16 values rounded to a 16-bit dtype.
template <pyft_dtype D>
__m256i narrow16(__m512 x) {
  if constexpr (D == PYFT_F16) return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);

#ifdef __AVX512BF16__
  const __mmask16 subnormal = _mm512_fpclass_ps_mask(x, 0x20);  // which the instruction takes for 0
  if (__builtin_expect(subnormal == 0, 1)) return (__m256i)_mm512_cvtneps_pbh(x);
#endif
  const __m512i u = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7FC0)));
}

struct Lanes16 {
  static constexpr int kLanes = 16;
  using Floats = __m512;
  using Wide = uint64_t __attribute__((vector_size(64)));
  using Narrow = uint32_t __attribute__((vector_size(32)));

  template <pyft_dtype D>
  static Floats load(const typename Dtype<D>::type* x) {
    return load16<D>(x);
  }
  template <pyft_dtype D>
  static void store(typename Dtype<D>::type* out, Floats x) {
    if constexpr (D == PYFT_F32) {
      _mm512_storeu_ps(out, x);
    } else {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), narrow16<D>(x));
    }
  }
  template <pyft_dtype D>
  static Floats load_some(const typename Dtype<D>::type* x, int count) {
    const auto mask = static_cast<__mmask16>((1u << count) - 1);
    if constexpr (D == PYFT_F32) {
      return _mm512_maskz_loadu_ps(mask, x);
    } else {
      return widen16<D>(_mm256_maskz_loadu_epi16(mask, x));
    }
  }
  template <pyft_dtype D>
  static void store_some(typename Dtype<D>::type* out, Floats x, int count) {
    const auto mask = static_cast<__mmask16>((1u << count) - 1);
    if constexpr (D == PYFT_F32) {
      _mm512_mask_storeu_ps(out, mask, x);
    } else {
      _mm256_mask_storeu_epi16(out, mask, narrow16<D>(x));
    }
  }
  static Floats splat(float x) { return _mm512_set1_ps(x); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static Floats scale(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }
  static Parts<Lanes16> split(Floats x) {
    const Floats rest = _mm512_reduce_ps(x, _MM_FROUND_NO_EXC);  // 0 of infinity
    return {x - rest, rest};
  }
  static Floats clamp(Floats x, float least, float most) {
    return _mm512_max_ps(splat(least), _mm512_min_ps(splat(most), x));  // of NaN and a number the second
  }
  static Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
  static Wide multiply_words(Wide a, uint32_t b) { return (Wide)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b)); }
  static Floats swap_pairs(Floats x) { return _mm512_permute_ps(x, 0xB1); }
};

}  // namespace
