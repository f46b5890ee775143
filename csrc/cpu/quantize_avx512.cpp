// 4-bit block quantization with AVX-512 (F, BW, VL, DQ): 16 elements a step to encode, 32 to decode.
#include <immintrin.h>

#include "quantize.h"

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

template <pyft_dtype D>
float vector_absmax(const typename Dtype<D>::type* x, int64_t count) {  // count: a multiple of 16
  __m512 largest = _mm512_setzero_ps();
  __mmask16 nan = 0;
  for (int64_t i = 0; i < count; i += 16) {
    const __m512 v = load16<D>(x + i);
    nan |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    largest = _mm512_max_ps(_mm512_abs_ps(v), largest);
  }
  return nan ? NAN : _mm512_reduce_max_ps(largest);
}

// Binary search among the 15 ascending midpoints (lane 15 unused): four look-ups instead of fifteen comparisons.
__m512i codes_of(__m512 x, __m512 midpoints) {
  __m512i code = _mm512_setzero_si512();
  for (int step = 8; step; step /= 2) {
    const __m512i probe = _mm512_add_epi32(code, _mm512_set1_epi32(step - 1));
    const __mmask16 above = _mm512_cmp_ps_mask(x, _mm512_permutexvar_ps(probe, midpoints), _CMP_GT_OQ);
    code = _mm512_mask_add_epi32(code, above, code, _mm512_set1_epi32(step));
  }
  return code;
}

template <pyft_dtype D>
float encode(const void* x, int64_t count, const float* midpoints, int zero_code, uint8_t* packed) {
  const auto* values = static_cast<const typename Dtype<D>::type*>(x);
  const bool whole = count % 16 == 0;
  const float absmax = whole ? vector_absmax<D>(values, count) : absmax_of<D>(values, count);
  if (!whole || absmax == 0.0f) {
    encode_tail<D>(values, 0, count, absmax, midpoints, zero_code, packed);
    return absmax;
  }
  const __m512 scale = _mm512_set1_ps(absmax), thresholds = _mm512_maskz_loadu_ps(0x7FFF, midpoints);
  const __m128i weights = _mm_set1_epi16(0x0110);  // even * 16 + odd
  for (int64_t i = 0; i < count; i += 16) {
    const __m512i code = codes_of(_mm512_div_ps(load16<D>(values + i), scale), thresholds);
    const __m128i pairs = _mm_maddubs_epi16(_mm512_cvtepi32_epi8(code), weights);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(packed + i / 2), _mm_packus_epi16(pairs, pairs));
  }
  return absmax;
}

// The 16 rounded products of the codes with absmax, in 16 bits, twice.
template <pyft_dtype D>
__m512i table_of(__m512 product) {
  __m256i half;
  if constexpr (D == PYFT_F16) {
    half = _mm512_cvtps_ph(product, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  } else {
    const __m512i u = _mm512_castps_si512(product);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    const __mmask16 nan = _mm512_cmp_ps_mask(product, product, _CMP_UNORD_Q);
    const __m512i high = _mm512_srli_epi32(rounded, 16);
    half = _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(high, nan, _mm512_set1_epi32(0x7FC0)));
  }
  return _mm512_broadcast_i64x4(half);
}

template <pyft_dtype D>
void decode(const uint8_t* packed, int64_t first, int64_t count, float absmax, const float* codes, void* out) {
  using T = typename Dtype<D>::type;
  T* values = static_cast<T*>(out);
  const __m512 product = _mm512_mul_ps(_mm512_loadu_ps(codes), _mm512_set1_ps(absmax));
  __m512i table = _mm512_castps_si512(product);
  if constexpr (D != PYFT_F32) table = table_of<D>(product);
  T tail[64 / sizeof(T)];
  _mm512_storeu_si512(tail, table);

  int64_t i = first % 2 && count > 0;
  decode_tail<D>(packed, first, i, tail, values);
  constexpr int step = 64 / sizeof(T);
  for (; i + step <= count; i += step) {
    const auto* bytes = reinterpret_cast<const __m128i*>(packed + (first + i) / 2);
    __m512i value;
    if constexpr (D == PYFT_F32) {
      const __m512i b = _mm512_cvtepu8_epi64(_mm_loadl_epi64(bytes));
      const __m512i low = _mm512_slli_epi64(_mm512_and_si512(b, _mm512_set1_epi64(15)), 32);
      const __m512i index = _mm512_or_si512(_mm512_srli_epi64(b, 4), low);
      value = _mm512_permutexvar_epi32(index, table);
    } else {
      const __m512i b = _mm512_cvtepu8_epi32(_mm_loadu_si128(bytes));
      const __m512i low = _mm512_slli_epi32(_mm512_and_si512(b, _mm512_set1_epi32(15)), 16);
      const __m512i index = _mm512_or_si512(_mm512_srli_epi32(b, 4), low);
      value = _mm512_permutexvar_epi16(index, table);
    }
    _mm512_storeu_si512(values + i, value);
  }
  decode_tail<D>(packed, first + i, count - i, tail, values + i);
}

}  // namespace

const Quantize4 quantize4_avx512 = {
    {encode<PYFT_F32>, encode<PYFT_F16>, encode<PYFT_BF16>},
    {decode<PYFT_F32>, decode<PYFT_F16>, decode<PYFT_BF16>},
};
