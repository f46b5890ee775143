// What each instruction set provides for 4-bit block quantization, and the scalar code all of them fall back on.
#pragma once

#include <math.h>

#include "convert.h"

// One table per instruction set; the arrays are indexed by pyft_dtype.
struct Quantize4 {
  // One block of `count` elements starting on a byte -> its packed codes; returns the block's absmax.
  float (*encode[3])(const void* x, int64_t count, const float* midpoints, int zero_code, uint8_t* packed);
  // Elements [first, first + count) of `packed`, all of one block with this absmax -> out[0 .. count).
  void (*decode[3])(const uint8_t* packed, int64_t first, int64_t count, float absmax, const float* codes, void* out);
};

extern const Quantize4 quantize4_scalar;
#ifdef PYFT_X86
extern const Quantize4 quantize4_avx2;
extern const Quantize4 quantize4_avx512;
#endif

namespace {

// The largest magnitude, NaN if any element is NaN.
template <pyft_dtype D>
float absmax_of(const typename Dtype<D>::type* x, int64_t count) {
  float largest = 0.0f;
  bool nan = false;
  for (int64_t i = 0; i < count; ++i) {
    const float magnitude = fabsf(Dtype<D>::load(x[i]));
    nan |= magnitude != magnitude;
    largest = magnitude > largest ? magnitude : largest;
  }
  return nan ? NAN : largest;
}

// How many of the 15 midpoints lie strictly below x; 0 for NaN.
inline int code_of(float x, const float* midpoints) {
  int code = 0;
  for (int i = 0; i < 15; ++i) code += x > midpoints[i];
  return code;
}

// Codes of elements [begin, count) of a block whose absmax is known; `begin` is even. An odd last byte is padded with
// the code of 0.
template <pyft_dtype D>
void encode_tail(const typename Dtype<D>::type* x, int64_t begin, int64_t count, float absmax, const float* midpoints,
                 int zero_code, uint8_t* packed) {
  auto code = [&](int64_t i) {
    if (absmax == 0.0f) return zero_code;
    return code_of((i < count ? Dtype<D>::load(x[i]) : 0.0f) / absmax, midpoints);
  };
  for (int64_t i = begin; i < count; i += 2) packed[i / 2] = static_cast<uint8_t>(code(i) << 4 | code(i + 1));
}

// The block's 16 possible values, rounded once to the output's dtype.
template <pyft_dtype D>
void scaled_codes(const float* codes, float absmax, typename Dtype<D>::type* table) {
  for (int i = 0; i < 16; ++i) table[i] = Dtype<D>::store(codes[i] * absmax);
}

template <pyft_dtype D>
void decode_tail(const uint8_t* packed, int64_t first, int64_t count, const typename Dtype<D>::type* table,
                 typename Dtype<D>::type* out) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t element = first + i;
    const uint8_t byte = packed[element / 2];
    out[i] = table[element % 2 ? byte & 15 : byte >> 4];
  }
}

}  // namespace
