// Sixteen values of a dtype to and from fp32, with AVX-512.
#pragma once

#include <immintrin.h>

#include "convert.h"

namespace {

template <pyft_dtype D>
__m512 load16(const typename Dtype<D>::type* x) {
  if constexpr (D == PYFT_F32) {
    return _mm512_loadu_ps(x);
  } else {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    if constexpr (D == PYFT_F16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
}

// 16 values rounded to a 16-bit dtype.
template <pyft_dtype D>
__m256i narrow16(__m512 x) {
  if constexpr (D == PYFT_F16) return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);

  const __m512i u = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7FC0)));
}

}  // namespace
