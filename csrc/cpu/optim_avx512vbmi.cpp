// Optimizers with 8-bit states with AVX-512 (F, BW, VL, DQ, VBMI): 64 elements a step, tables as byte planes in
// registers or the nearest cache, since a gather costs as much as twenty additions.
//
// A table of 256 (or 128) fp32 is four planes of bytes; two vpermi2b look up 64 bytes of a plane, and interleaving the
// four results makes fp32 of them. Elements travel through bytes in the order that packing and interleaving leave:
// lane L of the bytes holds elements 4L .. 4L+3 of four vectors of 16 (`transposed`).
//
// encode: the map has seven decades of evenly spaced codes, so the number of midpoints below |x| is, up to one, a
// concave function made of seven lines; the two that meet in x's binade are looked up by its exponent. The line is set
// 0.3 too low, which gives the code or the one before it, and one comparison with that one's midpoint decides.
#include <immintrin.h>

#include "optim.h"

namespace {

struct Lines {
  float offset[2][32], slope[2][32];  // of a binade's two lines, by the exponent's low five bits
};

struct Planes {
  uint8_t signed_codes[4][256], unsigned_codes[4][256], unsigned_midpoints[4][256];
  uint8_t signed_midpoints[4][128];  // those above 0; those below are their mirror image
  Lines lines[2];                    // by kSigned
};
static_assert(sizeof(Planes) <= sizeof(OptimScratch::bytes), "it lives there");

void split(const float* table, int n, uint8_t* planes) {
  for (int i = 0; i < n; ++i) {
    for (int k = 0; k < 4; ++k) planes[k * n + i] = static_cast<uint8_t>(bits_of(table[i]) >> (8 * k));
  }
}

// The decade of fractions that holds y (pyft/formats.py, dynamic_map): [10^(d - 7), 10^(d - 6)).
int decade_of(double y) {
  int decade = 0;
  for (double top = 1e-6; decade < 6 && y >= top; top *= 10) ++decade;
  return decade;
}

void make_lines(bool is_signed, Lines& lines) {
  double binade = 1.0 / (1 << 23);
  for (int exponent = 104; exponent <= 127; ++exponent, binade *= 2) {
    for (int end = 0; end < 2; ++end) {
      const int decade = decade_of(end ? binade * 1.999 : binade);
      double top = 1e-6;
      for (int i = 0; i < decade; ++i) top *= 10;
      const double count = is_signed ? 1 << decade : 2 << decade, before = is_signed ? count : count - 1;
      lines.slope[end][exponent % 32] = static_cast<float>(count / (0.9 * top));
      lines.offset[end][exponent % 32] = static_cast<float>(before - count / 9 - 0.3);
    }
  }
}

__m512i load64(const void* from) { return _mm512_loadu_si512(from); }

__m512i transposed(__m512i bytes) {
  return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), bytes);
}

// table[index] of 4 vectors of 16 elements, given the transposed bytes of their indices; kSize is 128 or 256.
template <int kSize>
void look_up(const uint8_t (&planes)[4][kSize], __m512i index, __m512 (&out)[4]) {
  __m512i byte[4];
  const __mmask64 upper = _mm512_movepi8_mask(index);
  for (int k = 0; k < 4; ++k) {
    byte[k] = _mm512_permutex2var_epi8(load64(planes[k]), index, load64(planes[k] + 64));
    if constexpr (kSize == 256) {
      const __m512i high = _mm512_permutex2var_epi8(load64(planes[k] + 128), index, load64(planes[k] + 192));
      byte[k] = _mm512_mask_blend_epi8(upper, byte[k], high);
    }
  }
  const __m512i low01 = _mm512_unpacklo_epi8(byte[0], byte[1]), high01 = _mm512_unpackhi_epi8(byte[0], byte[1]);
  const __m512i low23 = _mm512_unpacklo_epi8(byte[2], byte[3]), high23 = _mm512_unpackhi_epi8(byte[2], byte[3]);
  out[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low01, low23));
  out[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low01, low23));
  out[2] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(high01, high23));
  out[3] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(high01, high23));
}

// The transposed bytes of 4 vectors of integers 0 .. 255.
__m512i pack(const __m512i (&x)[4]) {
  return _mm512_packus_epi16(_mm512_packs_epi32(x[0], x[1]), _mm512_packs_epi32(x[2], x[3]));
}

// For y in [0, 1]: the number of midpoints of the positive half below y, or one less.
__m512i candidate(__m512 y, const Lines& lines) {
  const __m512 clamped = _mm512_max_ps(y, _mm512_set1_ps(0x1p-23f));
  const __m512i exponent = _mm512_srli_epi32(_mm512_castps_si512(clamped), 23);
  __m512 line[2];
  for (int i = 0; i < 2; ++i) {
    const float *offset = lines.offset[i], *slope = lines.slope[i];
    const __m512 a = _mm512_permutex2var_ps(_mm512_loadu_ps(offset), exponent, _mm512_loadu_ps(offset + 16));
    const __m512 b = _mm512_permutex2var_ps(_mm512_loadu_ps(slope), exponent, _mm512_loadu_ps(slope + 16));
    line[i] = _mm512_fmadd_ps(b, clamped, a);
  }
  return _mm512_cvttps_epi32(_mm512_min_ps(line[0], line[1]));
}

struct Vbmi {
  using Maps = Planes;

  static void prepare(const pyft_optim_maps& maps, OptimScratch& scratch) {
    auto& planes = *reinterpret_cast<Planes*>(scratch.bytes);
    split(codes_of<true>(maps), 256, planes.signed_codes[0]);
    split(codes_of<false>(maps), 256, planes.unsigned_codes[0]);
    split(midpoints_of<true>(maps) + kZeroCode<true>, 128, planes.signed_midpoints[0]);
    split(midpoints_of<false>(maps), 256, planes.unsigned_midpoints[0]);
    for (int i = 0; i < 2; ++i) make_lines(i == 1, planes.lines[i]);
  }

  static const Maps& maps_of(const OptimScratch& scratch) { return *reinterpret_cast<const Planes*>(scratch.bytes); }

  template <pyft_dtype D>
  static void widen(const typename Dtype<D>::type* from, float* to) {
    for (int i = 0; i < kOptimBlock; i += 16) {
      if constexpr (D == PYFT_F32) {
        _mm512_storeu_ps(to + i, _mm512_loadu_ps(from + i));
      } else {
        const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
        const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
        _mm512_storeu_ps(to + i, D == PYFT_F16 ? _mm512_cvtph_ps(half) : _mm512_castsi512_ps(high));
      }
    }
  }

  template <pyft_dtype D>
  static void narrow(const float* from, typename Dtype<D>::type* to) {
    if constexpr (D == PYFT_F16) {
      for (int i = 0; i < kOptimBlock; i += 16) {
        const __m256i half = _mm512_cvtps_ph(_mm512_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), half);
      }
    } else {
      for (int i = 0; i < kOptimBlock; ++i) to[i] = Dtype<D>::store(from[i]);
    }
  }

  template <bool kSigned>
  static void decode(const uint8_t* codes, float absmax, const Planes& planes, float* out) {
    const __m512 scale = _mm512_set1_ps(absmax);
    for (int i = 0; i < kOptimBlock; i += 64) {
      __m512 value[4];
      look_up(kSigned ? planes.signed_codes : planes.unsigned_codes, transposed(load64(codes + i)), value);
      for (int j = 0; j < 4; ++j) _mm512_storeu_ps(out + i + 16 * j, _mm512_mul_ps(value[j], scale));
    }
  }

  template <bool kSigned>
  static void encode(const float* x, float absmax, const Planes& planes, uint8_t* codes) {
    const __m512 scale = _mm512_set1_ps(absmax);
    const __m512i one = _mm512_set1_epi32(1), zero_code = _mm512_set1_epi32(kZeroCode<kSigned>);
    for (int i = 0; i < kOptimBlock; i += 64) {
      __m512 y[4], midpoint[4];
      __m512i count[4];
      for (int j = 0; j < 4; ++j) {
        y[j] = _mm512_div_ps(_mm512_abs_ps(_mm512_loadu_ps(x + i + 16 * j)), scale);
        count[j] = candidate(y[j], planes.lines[kSigned]);
      }
      if constexpr (kSigned) {
        look_up(planes.signed_midpoints, pack(count), midpoint);
      } else {
        look_up(planes.unsigned_midpoints, pack(count), midpoint);
      }
      for (int j = 0; j < 4; ++j) {
        const __m512i value = _mm512_loadu_si512(x + i + 16 * j);
        if constexpr (kSigned) {
          // Below 0 the midpoints strictly below x are those whose mirror image is above |x|, not at it.
          const __m512i y_bits = _mm512_add_epi32(_mm512_castps_si512(y[j]), _mm512_srli_epi32(value, 31));
          const __mmask16 above = _mm512_cmpgt_epi32_mask(y_bits, _mm512_castps_si512(midpoint[j]));
          count[j] = _mm512_mask_add_epi32(count[j], above, count[j], one);
          const __mmask16 negative = _mm512_movepi32_mask(value);
          const __m512i up = _mm512_add_epi32(zero_code, count[j]);
          count[j] = _mm512_mask_sub_epi32(up, negative, zero_code, count[j]);
          count[j] = _mm512_max_epi32(count[j], _mm512_setzero_si512());
        } else {
          const __mmask16 above = _mm512_cmp_ps_mask(y[j], midpoint[j], _CMP_GT_OQ);
          count[j] = _mm512_mask_add_epi32(count[j], above, count[j], one);
          const __mmask16 nonzero = _mm512_test_epi32_mask(value, value);
          count[j] = _mm512_mask_max_epi32(count[j], nonzero, count[j], one);
        }
      }
      _mm512_storeu_si512(codes + i, transposed(pack(count)));
    }
  }
};

}  // namespace

const OptimKernels optim_vbmi = {
    Vbmi::prepare,
    {update_tensor<Vbmi, PYFT_F32>, update_tensor<Vbmi, PYFT_F16>, update_tensor<Vbmi, PYFT_BF16>},
};
