// Block-wise quantization with AVX2 and F16C: 8 or 32 elements a step.
#include "quantize.h"
#include "vectors_avx2.h"

namespace {

template <pyft_dtype D>
Range range(const void* x, int64_t count) {
  const auto* values = static_cast<const typename Dtype<D>::type*>(x);
  __m256 low = _mm256_setzero_ps(), high = _mm256_setzero_ps(), nan = _mm256_setzero_ps();
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m256 v = load8<D>(values + i);
    nan = _mm256_or_ps(nan, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    low = _mm256_min_ps(v, low);
    high = _mm256_max_ps(v, high);
  }
  if (_mm256_movemask_ps(nan)) return {NAN, NAN};
  float lows[8], highs[8];
  _mm256_storeu_ps(lows, low);
  _mm256_storeu_ps(highs, high);
  const Range found = extend<PYFT_F32>(extend<PYFT_F32>({0.0f, 0.0f}, lows, 8), highs, 8);
  return extend<D>(found, values + i, count - i);
}

__m256i levels4(__m256 x, const float* thresholds) {
  __m256i level = _mm256_setzero_si256();
  for (int i = 0; i < 15; ++i) {
    const __m256 above = _mm256_cmp_ps(x, _mm256_broadcast_ss(thresholds + i), _CMP_GT_OQ);
    level = _mm256_sub_epi32(level, _mm256_castps_si256(above));
  }
  return level;
}

__m256i levels8(__m256 x, const float* thresholds) {
  __m256i level = _mm256_setzero_si256();
  for (int step = 128; step; step /= 2) {
    const __m256 middle = _mm256_i32gather_ps(thresholds + step - 1, level, 4);
    const __m256i above = _mm256_castps_si256(_mm256_cmp_ps(x, middle, _CMP_GT_OQ));
    level = _mm256_add_epi32(level, _mm256_and_si256(above, _mm256_set1_epi32(step)));
  }
  return level;
}

template <pyft_dtype D, int kBits>
void encode(const void* x, int64_t count, float scale, float zero, const pyft_coding& coding, uint8_t* packed) {
  const auto* values = static_cast<const typename Dtype<D>::type*>(x);
  const __m256 scales = _mm256_set1_ps(scale), zeros = _mm256_set1_ps(zero);
  alignas(32) int level[8];
  int64_t i = 0;
  for (; scale != 0.0f && i + 8 <= count; i += 8) {
    const __m256 scaled = _mm256_add_ps(_mm256_div_ps(load8<D>(values + i), scales), zeros);
    const __m256i found = kBits == 4 ? levels4(scaled, coding.thresholds) : levels8(scaled, coding.thresholds);
    _mm256_store_si256(reinterpret_cast<__m256i*>(level), found);
    if constexpr (kBits == 4) {
      for (int j = 0; j < 8; j += 2) {
        packed[(i + j) / 2] = static_cast<uint8_t>(coding.order[level[j]] << 4 | coding.order[level[j + 1]]);
      }
    } else {
      for (int j = 0; j < 8; ++j) packed[i + j] = coding.order[level[j]];
    }
  }
  encode_tail<D, kBits>(values, i, count, scale, zero, coding, packed);
}

// 16 packed bytes -> 32 indices, one a byte, in element order.
__m256i unpack(const uint8_t* packed) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed));
  const __m128i mask = _mm_set1_epi8(15);
  const __m128i even = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask), odd = _mm_and_si128(bytes, mask);
  return _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
}

// 32 values of a 4-byte table.
void look_up(__m256i index, const float* table, float* out) {
  const __m256 low = _mm256_loadu_ps(table), high = _mm256_loadu_ps(table + 8);
  alignas(32) uint8_t bytes[32];
  _mm256_store_si256(reinterpret_cast<__m256i*>(bytes), index);
  for (int j = 0; j < 4; ++j) {
    const __m256i i = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes + 8 * j)));
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(i, 28));  // bit 3 as the sign blendv reads
    const __m256 value = _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, i), _mm256_permutevar8x32_ps(high, i), upper);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 8 * j), _mm256_castps_si256(value));
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
void decode4(const pyft_weight& w, int64_t begin, int64_t end, typename Dtype<D>::type* out) {
  for_each_block(w, begin, end, [&](int64_t first, int64_t count, float scale, float zero, int64_t offset) {
    auto* values = out + offset;
    typename Dtype<D>::type table[16];
    for (int half = 0; half < 16; half += 8) {
      const __m256 codes = _mm256_sub_ps(_mm256_loadu_ps(w.codes + half), _mm256_set1_ps(zero));
      store8<D>(table + half, _mm256_mul_ps(codes, _mm256_set1_ps(scale)));
    }
    int64_t i = first % 2;
    decode_tail4(w.packed, first, i, table, values);
    for (; i + 32 <= count; i += 32) look_up(unpack(w.packed + (first + i) / 2), table, values + i);
    decode_tail4(w.packed, first + i, count - i, table, values + i);
  });
}

template <pyft_dtype D>
void decode8(const pyft_weight& w, int64_t begin, int64_t end, typename Dtype<D>::type* out) {
  for_each_block(w, begin, end, [&](int64_t first, int64_t count, float scale, float zero, int64_t offset) {
    auto* values = out + offset;
    const uint8_t* bytes = w.packed + first;
    const __m256 scales = _mm256_set1_ps(scale), zeros = _mm256_set1_ps(zero);
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
      const __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes + i)));
      const __m256 code = _mm256_i32gather_ps(w.codes, index, 4);
      store8<D>(values + i, _mm256_mul_ps(_mm256_sub_ps(code, zeros), scales));
    }
    decode_tail8<D>(bytes + i, count - i, w.codes, scale, zero, values + i);
  });
}

template <pyft_dtype D, int kBits>
void decode(const pyft_weight& w, int64_t begin, int64_t end, void* out) {
  auto* values = static_cast<typename Dtype<D>::type*>(out);
  kBits == 4 ? decode4<D>(w, begin, end, values) : decode8<D>(w, begin, end, values);
}

}  // namespace

const Quantize quantize_avx2 = {
    {range<PYFT_F32>, range<PYFT_F16>, range<PYFT_BF16>},
    {{encode<PYFT_F32, 4>, encode<PYFT_F32, 8>},
     {encode<PYFT_F16, 4>, encode<PYFT_F16, 8>},
     {encode<PYFT_BF16, 4>, encode<PYFT_BF16, 8>}},
    {{decode<PYFT_F32, 4>, decode<PYFT_F32, 8>},
     {decode<PYFT_F16, 4>, decode<PYFT_F16, 8>},
     {decode<PYFT_BF16, 4>, decode<PYFT_BF16, 8>}},
};
