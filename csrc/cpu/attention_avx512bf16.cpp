// Attention of bf16 with AVX512-BF16: products of pairs of bf16, P and dS rounded to it.
#include "attention_kernels.h"
#include "vectors_avx512.h"

namespace {

struct Pairs {
  using V = Lanes16;
  using Floats = __m512;
  static constexpr int kPairs = 2, kRows = 8;

  static Floats multiply(Floats a, Floats b, Floats c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }

  // first, first + apart, first + 1, first + 1 + apart, ...: numbers of 16 bits
  static __m512i alternating(int first, int apart) {
    const __m512i even = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i both = _mm512_or_si512(even, _mm512_slli_epi32(even, 16));
    return _mm512_add_epi32(both, _mm512_set1_epi32(first | (first + apart) << 16));
  }

  // The first `count` of 32 numbers; the others are 0.
  static __m512i load_some(const uint16_t* x, int64_t count) {
    const auto mask = count < 32 ? static_cast<__mmask32>((1u << count) - 1) : ~__mmask32{0};
    return _mm512_maskz_loadu_epi16(mask, x);
  }

  template <pyft_dtype>
  static void load_row(const uint16_t* x, int64_t cols, float* out, int64_t width) {
    for (int64_t i = 0; i < width * 2; i += 32) {
      const int64_t rest = cols - i;
      _mm512_storeu_si512(out + i / 2, load_some(x + i, rest > 0 ? rest : 0));
    }
  }

  template <pyft_dtype>
  static void load_columns(const uint16_t* x, const uint16_t* y, int64_t cols, float* out) {
    for (int64_t i = 0; i < cols; i += 32) {
      const __m512i low = load_some(x + i, cols - i), high = y ? load_some(y + i, cols - i) : __m512i{};
      _mm512_storeu_si512(out + i, _mm512_permutex2var_epi16(low, alternating(0, 32), high));
      if (cols - i > 16) _mm512_storeu_si512(out + i + 16, _mm512_permutex2var_epi16(low, alternating(16, 32), high));
    }
  }

  static void store_row(float* row, int64_t i, Floats x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + i / 2), (__m256i)_mm512_cvtneps_pbh(x));
  }

  static void store_column(float* row, int64_t i, const Floats* x) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(x[1], x[0]);
    _mm512_storeu_si512(row + i, _mm512_permutexvar_epi16(alternating(0, 16), both));
  }
};

}  // namespace

const AttentionKernels attention_avx512bf16 = {{{}, {}, passes_of<Pairs, PYFT_BF16>()}};
