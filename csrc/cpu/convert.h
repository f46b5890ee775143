// Conversions between fp32 and the 16-bit floats, round to nearest even, one private copy per source file: every file
// is compiled for its own instruction set, so nothing here may be shared by the linker.
#pragma once

#include <stdint.h>
#include <string.h>

#include "../pyft.h"

namespace {

inline uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}

inline float float_of(uint32_t u) {
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
}

// A dtype's storage and its two conversions.
template <pyft_dtype D>
struct Dtype;

template <>
struct Dtype<PYFT_F32> {
  using type = float;
  static float load(float x) { return x; }
  static float store(float x) { return x; }
};

template <>
struct Dtype<PYFT_BF16> {
  using type = uint16_t;
  static float load(uint16_t h) { return float_of(static_cast<uint32_t>(h) << 16); }
  static uint16_t store(float x) {
    const uint32_t u = bits_of(x);
    if ((u & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FC0;
    return static_cast<uint16_t>((u + 0x7FFFu + ((u >> 16) & 1u)) >> 16);
  }
};

template <>
struct Dtype<PYFT_F16> {
  using type = uint16_t;
  static float load(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
    const uint32_t magnitude = h & 0x7FFFu;
    if (magnitude >= 0x7C00u) return float_of(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);  // inf, NaN
    if (magnitude >= 0x0400u) return float_of(sign | ((magnitude << 13) + (112u << 23)));
    const float subnormal = static_cast<float>(magnitude) * 5.9604644775390625e-8f;  // exact: 2^-24
    return float_of(sign | bits_of(subnormal));
  }
  static uint16_t store(float x) {
    const uint32_t u = bits_of(x);
    const uint32_t sign = (u >> 16) & 0x8000u;
    const uint32_t magnitude = u & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u);
    if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7C00u);  // 65536 and above
    if (magnitude < 0x38800000u) {  // below 2^-14: let the adder of 0.5f round to a multiple of 2^-24
      return static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u));
    }
    return static_cast<uint16_t>(sign | ((magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13));
  }
};

}  // namespace
