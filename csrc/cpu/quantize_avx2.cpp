// 4-bit block quantization with AVX2 and F16C: 32 elements a step.
#include <immintrin.h>

#include "quantize.h"

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
float vector_absmax(const typename Dtype<D>::type* x, int64_t count) {  // count: a multiple of 32
  const __m256 sign = _mm256_set1_ps(-0.0f);
  __m256 largest = _mm256_setzero_ps(), nan = _mm256_setzero_ps();
  for (int64_t i = 0; i < count; i += 8) {
    const __m256 v = load8<D>(x + i);
    nan = _mm256_or_ps(nan, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    largest = _mm256_max_ps(_mm256_andnot_ps(sign, v), largest);
  }
  if (_mm256_movemask_ps(nan)) return NAN;
  float lanes[8], result = 0.0f;
  _mm256_storeu_ps(lanes, largest);
  for (float lane : lanes) result = lane > result ? lane : result;
  return result;
}

__m256i codes_of(__m256 x, const float* midpoints) {
  __m256i code = _mm256_setzero_si256();
  for (int i = 0; i < 15; ++i) {
    const __m256 above = _mm256_cmp_ps(x, _mm256_broadcast_ss(midpoints + i), _CMP_GT_OQ);
    code = _mm256_sub_epi32(code, _mm256_castps_si256(above));
  }
  return code;
}

template <pyft_dtype D>
float encode(const void* x, int64_t count, const float* midpoints, int zero_code, uint8_t* packed) {
  const auto* values = static_cast<const typename Dtype<D>::type*>(x);
  const bool whole = count % 32 == 0;
  const float absmax = whole ? vector_absmax<D>(values, count) : absmax_of<D>(values, count);
  if (!whole || absmax == 0.0f) {
    encode_tail<D>(values, 0, count, absmax, midpoints, zero_code, packed);
    return absmax;
  }
  const __m256 scale = _mm256_set1_ps(absmax);
  const __m256i lane_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (int64_t i = 0; i < count; i += 32) {
    __m256i c[4];
    for (int j = 0; j < 4; ++j) c[j] = codes_of(_mm256_div_ps(load8<D>(values + i + 8 * j), scale), midpoints);
    const __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(c[0], c[1]), _mm256_packs_epi32(c[2], c[3]));
    const __m256i ordered = _mm256_permutevar8x32_epi32(bytes, lane_order);
    const __m256i pairs = _mm256_maddubs_epi16(ordered, _mm256_set1_epi16(0x0110));  // even * 16 + odd
    const __m128i nibbles = _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(packed + i / 2), nibbles);
  }
  return absmax;
}

// 16 packed bytes -> 32 code indices, one a byte, in element order.
__m256i unpack(const uint8_t* packed) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed));
  const __m128i mask = _mm_set1_epi8(15);
  const __m128i even = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask), odd = _mm_and_si128(bytes, mask);
  return _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
}

// 32 values of a 4-byte table.
void look_up(__m256i index, const float* table, float* out) {
  const __m256 low = _mm256_loadu_ps(table), high = _mm256_loadu_ps(table + 8);
  uint8_t bytes[32];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(bytes), index);
  for (int j = 0; j < 4; ++j) {
    const __m256i i = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes + 8 * j)));
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(i, 28));  // bit 3 as the sign blendv reads
    const __m256 value = _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, i), _mm256_permutevar8x32_ps(high, i), upper);
    _mm256_storeu_ps(out + 8 * j, value);
  }
}

// 32 values of a 2-byte table, as two byte shuffles.
void look_up(__m256i index, const uint16_t* table, uint16_t* out) {
  const __m128i mask = _mm_set1_epi16(0xFF);
  const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  const __m128i second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table + 8));
  const __m128i low = _mm_packus_epi16(_mm_and_si128(first, mask), _mm_and_si128(second, mask));
  const __m128i high = _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8));
  const __m256i l = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(low), index);
  const __m256i h = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(high), index);
  const __m256i a = _mm256_unpacklo_epi8(l, h), b = _mm256_unpackhi_epi8(l, h);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permute2x128_si256(a, b, 0x20));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16), _mm256_permute2x128_si256(a, b, 0x31));
}

template <pyft_dtype D>
void decode(const uint8_t* packed, int64_t first, int64_t count, float absmax, const float* codes, void* out) {
  typename Dtype<D>::type table[16];
  scaled_codes<D>(codes, absmax, table);
  auto* values = static_cast<typename Dtype<D>::type*>(out);
  int64_t i = first % 2 && count > 0;
  decode_tail<D>(packed, first, i, table, values);
  for (; i + 32 <= count; i += 32) look_up(unpack(packed + (first + i) / 2), table, values + i);
  decode_tail<D>(packed, first + i, count - i, table, values + i);
}

}  // namespace

const Quantize4 quantize4_avx2 = {
    {encode<PYFT_F32>, encode<PYFT_F16>, encode<PYFT_BF16>},
    {decode<PYFT_F32>, decode<PYFT_F16>, decode<PYFT_BF16>},
};
