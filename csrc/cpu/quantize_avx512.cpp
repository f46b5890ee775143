// Block-wise quantization with AVX-512 (F, BW, VL, DQ): 16 elements a step to encode, a cache line to decode.
#include "quantize.h"
#include "vectors_avx512.h"

namespace {

template <pyft_dtype D>
Range range(const void* x, int64_t count) {
  const auto* values = static_cast<const typename Dtype<D>::type*>(x);
  __m512 low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
  __mmask16 nan = 0;
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m512 v = load16<D>(values + i);
    nan |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    low = _mm512_min_ps(v, low);
    high = _mm512_max_ps(v, high);
  }
  if (nan) return {NAN, NAN};
  return extend<D>({_mm512_reduce_min_ps(low), _mm512_reduce_max_ps(high)}, values + i, count - i);
}

// Binary search among 15 ascending thresholds (lane 15 unused): four look-ups instead of fifteen comparisons.
__m512i levels4(__m512 x, __m512 thresholds) {
  __m512i level = _mm512_setzero_si512();
  for (int step = 8; step; step /= 2) {
    const __m512i probe = _mm512_add_epi32(level, _mm512_set1_epi32(step - 1));
    const __mmask16 above = _mm512_cmp_ps_mask(x, _mm512_permutexvar_ps(probe, thresholds), _CMP_GT_OQ);
    level = _mm512_mask_add_epi32(level, above, level, _mm512_set1_epi32(step));
  }
  return level;
}

// Binary search among 255: five steps in every eighth threshold, which two registers hold, then three in memory.
struct Thresholds256 {
  const float* all;
  __m512 low, high;
  explicit Thresholds256(const float* thresholds) : all(thresholds) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i eighth = _mm512_slli_epi32(lane, 3);
    low = _mm512_i32gather_ps(eighth, thresholds + 7, 4);
    high = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), 0x7FFF, eighth, thresholds + 135, 4);
  }
  __m512i levels(__m512 x) const {
    __m512i level = _mm512_setzero_si512();
    for (int step = 16; step; step /= 2) {
      const __m512i probe = _mm512_add_epi32(level, _mm512_set1_epi32(step - 1));
      const __mmask16 above = _mm512_cmp_ps_mask(x, _mm512_permutex2var_ps(low, probe, high), _CMP_GT_OQ);
      level = _mm512_mask_add_epi32(level, above, level, _mm512_set1_epi32(step));
    }
    level = _mm512_slli_epi32(level, 3);
    for (int step = 4; step; step /= 2) {
      const __m512 middle = _mm512_i32gather_ps(level, all + step - 1, 4);
      const __mmask16 above = _mm512_cmp_ps_mask(x, middle, _CMP_GT_OQ);
      level = _mm512_mask_add_epi32(level, above, level, _mm512_set1_epi32(step));
    }
    return level;
  }
};

// What a value's level is found with, by the number of bits of a code.
template <int kBits>
auto searched(const float* thresholds) {
  if constexpr (kBits == 4) return _mm512_maskz_loadu_ps(0x7FFF, thresholds);
  if constexpr (kBits == 8) return Thresholds256(thresholds);
}

template <pyft_dtype D, int kBits>
void encode(const void* x, int64_t count, float scale, float zero, const pyft_coding& coding, uint8_t* packed) {
  const auto* values = static_cast<const typename Dtype<D>::type*>(x);
  const __m512 scales = _mm512_set1_ps(scale), zeros = _mm512_set1_ps(zero);
  const auto thresholds = searched<kBits>(coding.thresholds);
  const __m512i order = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(coding.order)));
  const __m128i weights = _mm_set1_epi16(0x0110);  // even * 16 + odd
  int64_t i = 0;
  for (; scale != 0.0f && i + 16 <= count; i += 16) {
    const __m512 scaled = _mm512_add_ps(_mm512_div_ps(load16<D>(values + i), scales), zeros);
    if constexpr (kBits == 4) {
      const __m512i code = _mm512_permutexvar_epi32(levels4(scaled, thresholds), order);
      const __m128i pairs = _mm_maddubs_epi16(_mm512_cvtepi32_epi8(code), weights);
      _mm_storel_epi64(reinterpret_cast<__m128i*>(packed + i / 2), _mm_packus_epi16(pairs, pairs));
    } else {
      alignas(64) int level[16];
      _mm512_store_si512(level, thresholds.levels(scaled));
      for (int j = 0; j < 16; ++j) packed[i + j] = coding.order[level[j]];
    }
  }
  encode_tail<D, kBits>(values, i, count, scale, zero, coding, packed);
}

// 4-bit codes: the block's 16 possible values are a register, each element a look-up in it.
template <pyft_dtype D>
void decode4(const pyft_weight& w, int64_t begin, int64_t end, typename Dtype<D>::type* out) {
  using T = typename Dtype<D>::type;
  const __m512 codes = _mm512_loadu_ps(w.codes);
  for_each_block(w, begin, end, [&](int64_t first, int64_t count, float scale, float zero, int64_t offset) {
    T* values = out + offset;
    const __m512 product = _mm512_mul_ps(_mm512_sub_ps(codes, _mm512_set1_ps(zero)), _mm512_set1_ps(scale));
    __m512i table = _mm512_castps_si512(product);
    if constexpr (D != PYFT_F32) table = _mm512_broadcast_i64x4(narrow16<D>(product));
    T tail[64 / sizeof(T)];
    int64_t i = first % 2;
    if (i) {
      _mm512_storeu_si512(tail, table);
      decode_tail4(w.packed, first, 1, tail, values);
    }
    constexpr int kStep = 64 / sizeof(T);
    for (; i + kStep <= count; i += kStep) {
      const auto* bytes = reinterpret_cast<const __m128i*>(w.packed + (first + i) / 2);
      if constexpr (D == PYFT_F32) {
        const __m512i b = _mm512_cvtepu8_epi64(_mm_loadl_epi64(bytes));
        const __m512i index = _mm512_or_si512(_mm512_srli_epi64(b, 4), _mm512_slli_epi64(b, 32));
        _mm512_storeu_si512(values + i, _mm512_permutexvar_epi32(index, table));  // reads the low 4 bits of each index
      } else {
        const __m512i b = _mm512_cvtepu8_epi32(_mm_loadu_si128(bytes));
        const __m512i index = _mm512_or_si512(_mm512_srli_epi32(b, 4), _mm512_slli_epi32(b, 16));
        _mm512_storeu_si512(values + i,
                            _mm512_permutexvar_epi16(index, table));  // the table is there twice: bit 4 is free
      }
    }
    if (i < count) {
      _mm512_storeu_si512(tail, table);
      decode_tail4(w.packed, first + i, count - i, tail, values + i);
    }
  });
}

// 16 of 256 values: eight look-ups of 32 entries each, chosen among by the index's upper three bits.
struct Table256 {
  __m512 part[16];
  explicit Table256(const float* codes) {
    for (int i = 0; i < 16; ++i) part[i] = _mm512_loadu_ps(codes + 16 * i);
  }
  __m512 operator()(__m512i index) const {
    __m512 found[8];
    for (int i = 0; i < 8; ++i) found[i] = _mm512_permutex2var_ps(part[2 * i], index, part[2 * i + 1]);
    for (int bit = 5, left = 4; left; ++bit, left /= 2) {
      const __mmask16 set = _mm512_test_epi32_mask(index, _mm512_set1_epi32(1 << bit));
      for (int i = 0; i < left; ++i) found[i] = _mm512_mask_blend_ps(set, found[2 * i], found[2 * i + 1]);
    }
    return found[0];
  }
};

template <pyft_dtype D>
void decode8(const pyft_weight& w, int64_t begin, int64_t end, typename Dtype<D>::type* out) {
  const Table256 table(w.codes);
  for_each_block(w, begin, end, [&](int64_t first, int64_t count, float scale, float zero, int64_t offset) {
    auto* values = out + offset;
    const uint8_t* bytes = w.packed + first;
    const __m512 scales = _mm512_set1_ps(scale), zeros = _mm512_set1_ps(zero);
    auto value = [&](int64_t i) {
      const __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + i)));
      return _mm512_mul_ps(_mm512_sub_ps(table(index), zeros), scales);
    };
    constexpr int kStep = 64 / sizeof(*out);
    int64_t i = 0;
    for (; i + kStep <= count; i += kStep) {
      if constexpr (D == PYFT_F32) {
        _mm512_storeu_si512(values + i, _mm512_castps_si512(value(i)));
      } else {
        const __m512i low = _mm512_castsi256_si512(narrow16<D>(value(i)));
        _mm512_storeu_si512(values + i, _mm512_inserti64x4(low, narrow16<D>(value(i + 16)), 1));
      }
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

const Quantize quantize_avx512 = {
    {range<PYFT_F32>, range<PYFT_F16>, range<PYFT_BF16>},
    {{encode<PYFT_F32, 4>, encode<PYFT_F32, 8>},
     {encode<PYFT_F16, 4>, encode<PYFT_F16, 8>},
     {encode<PYFT_BF16, 4>, encode<PYFT_BF16, 8>}},
    {{decode<PYFT_F32, 4>, decode<PYFT_F32, 8>},
     {decode<PYFT_F16, 4>, decode<PYFT_F16, 8>},
     {decode<PYFT_BF16, 4>, decode<PYFT_BF16, 8>}},
};
