// Optimizers with 8-bit states with AVX2 and F16C: 8 elements a step, tables by gather.
#include <immintrin.h>

#include "optim.h"

namespace {

// 8 bytes as 8 words of 32 bits.
__m256i bytes8(const uint8_t* from) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
}

struct Avx2 : PlainMaps {
  template <pyft_dtype D>
  static void widen(const typename Dtype<D>::type* from, float* to) {
    if constexpr (D == PYFT_F32) {
      memcpy(to, from, kOptimBlock * sizeof(float));
    } else {
      for (int i = 0; i < kOptimBlock; i += 8) {
        const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
        const __m256i high = _mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
        _mm256_storeu_ps(to + i, D == PYFT_F16 ? _mm256_cvtph_ps(half) : _mm256_castsi256_ps(high));
      }
    }
  }

  template <pyft_dtype D>
  static void narrow(const float* from, typename Dtype<D>::type* to) {
    if constexpr (D == PYFT_F16) {
      for (int i = 0; i < kOptimBlock; i += 8) {
        const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), half);
      }
    } else {
      for (int i = 0; i < kOptimBlock; ++i) to[i] = Dtype<D>::store(from[i]);
    }
  }

  template <bool kSigned>
  static void decode(const uint8_t* codes, float absmax, const Maps& maps, float* out) {
    const float* map = codes_of<kSigned>(maps);
    const __m256 scale = _mm256_set1_ps(absmax);
    for (int i = 0; i < kOptimBlock; i += 8) {
      _mm256_storeu_ps(out + i, _mm256_mul_ps(_mm256_i32gather_ps(map, bytes8(codes + i), 4), scale));
    }
  }

  template <bool kSigned>
  static void encode(const float* x, float absmax, const Maps& maps, uint8_t* codes) {
    const float* midpoints = midpoints_of<kSigned>(maps);
    const int* starts = reinterpret_cast<const int*>(starts_of<kSigned>(maps));
    const __m256 scale = _mm256_set1_ps(absmax), zero = _mm256_setzero_ps();
    const __m256i smallest = _mm256_set1_epi32(kSmallest), row = _mm256_set1_epi32(PYFT_OPTIM_BUCKETS);
    for (int i = 0; i < kOptimBlock; i += 8) {
      const __m256 value = _mm256_loadu_ps(x + i), scaled = _mm256_div_ps(value, scale);
      const __m256i bits = _mm256_castps_si256(scaled);
      const __m256i magnitude = _mm256_max_epi32(_mm256_and_si256(bits, _mm256_set1_epi32(kMagnitude)), smallest);
      __m256i bucket = _mm256_srli_epi32(_mm256_sub_epi32(magnitude, smallest), 23 - PYFT_OPTIM_MANTISSA);
      if (kSigned) bucket = _mm256_add_epi32(bucket, _mm256_and_si256(_mm256_srai_epi32(bits, 31), row));
      const __m256i start = _mm256_and_si256(_mm256_i32gather_epi32(starts, bucket, 1), _mm256_set1_epi32(255));
      const __m256 above = _mm256_cmp_ps(scaled, _mm256_i32gather_ps(midpoints, start, 4), _CMP_GT_OQ);
      __m256i code = _mm256_sub_epi32(start, _mm256_castps_si256(above));
      if (!kSigned) {
        const __m256i positive = _mm256_castps_si256(_mm256_cmp_ps(value, zero, _CMP_GT_OQ));
        code = _mm256_max_epi32(code, _mm256_srli_epi32(positive, 31));
      }
      const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + i), _mm_packus_epi16(words, words));
    }
  }
};

}  // namespace

const OptimKernels optim_avx2 = {
    Avx2::prepare,
    {update_tensor<Avx2, PYFT_F32>, update_tensor<Avx2, PYFT_F16>, update_tensor<Avx2, PYFT_BF16>},
};
