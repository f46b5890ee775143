// What each instruction set provides for block-wise quantization, and the scalar code all of them fall back on.
#pragma once

#include <math.h>

#include "convert.h"

// The smallest and largest of a block's elements and 0; NaN both if any element is.
struct Range {
  float low, high;
};

// One table per instruction set; arrays are indexed by pyft_dtype, then by bits == 8.
struct Quantize {
  Range (*range[3])(const void* x, int64_t count);
  // One block of `count` elements starting on a byte, with its scale and zero point -> its codes.
  void (*encode[3][2])(const void* x, int64_t count, float scale, float zero, const pyft_coding& coding,
                       uint8_t* packed);
  // Elements [begin, end) of the flattened weight -> out.
  void (*decode[3][2])(const pyft_weight& w, int64_t begin, int64_t end, void* out);
};

extern const Quantize quantize_scalar;
#ifdef PYFT_X86
extern const Quantize quantize_avx2;
extern const Quantize quantize_avx512;
#endif

// The table of an instruction set; null when this CPU lacks it.
const Quantize* quantize_kernels(pyft_isa isa);

namespace {

constexpr int64_t kNestedBlock = 256;

inline float scale_at(const pyft_weight& w, int64_t block) {
  if (!w.scale_codes) return static_cast<const float*>(w.scales)[block];
  const float scale = w.scale_codes[static_cast<const uint8_t*>(w.scales)[block]];
  return w.nested ? scale * w.nested[block / kNestedBlock] + *w.offset : scale;
}

inline float zero_at(const pyft_weight& w, int64_t block) { return w.zeros ? w.zeros[block] : 0.0f; }

template <pyft_dtype D>
Range extend(Range range, const typename Dtype<D>::type* x, int64_t count) {
  bool nan = range.low != range.low;
  for (int64_t i = 0; i < count; ++i) {
    const float value = Dtype<D>::load(x[i]);
    nan |= value != value;
    range.low = value < range.low ? value : range.low;
    range.high = value > range.high ? value : range.high;
  }
  return nan ? Range{NAN, NAN} : range;
}

// How many of the 2^kBits - 1 thresholds lie strictly below x; 0 for NaN.
template <int kBits>
int level_of(float x, const float* thresholds) {
  int level = 0;
  for (int step = 1 << (kBits - 1); step; step /= 2) level += x > thresholds[level + step - 1] ? step : 0;
  return level;
}

// Codes of elements [begin, count) of a block; `begin` is even. An odd last nibble takes the code of 0.
template <pyft_dtype D, int kBits>
void encode_tail(const typename Dtype<D>::type* x, int64_t begin, int64_t count, float scale, float zero,
                 const pyft_coding& coding, uint8_t* packed) {
  auto code = [&](int64_t i) -> uint8_t {
    if (i >= count || scale == 0.0f) return static_cast<uint8_t>(coding.zero_code);
    return coding.order[level_of<kBits>(Dtype<D>::load(x[i]) / scale + zero, coding.thresholds)];
  };
  if (kBits == 8) {
    for (int64_t i = begin; i < count; ++i) packed[i] = code(i);
  } else {
    for (int64_t i = begin; i < count; i += 2) packed[i / 2] = static_cast<uint8_t>(code(i) << 4 | code(i + 1));
  }
}

// The 16 values a block of 4-bit codes can have, rounded once to the output's dtype.
template <pyft_dtype D>
void value_table(const float* codes, float scale, float zero, typename Dtype<D>::type* table) {
  for (int i = 0; i < 16; ++i) table[i] = Dtype<D>::store((codes[i] - zero) * scale);
}

template <class T>
void decode_tail4(const uint8_t* packed, int64_t first, int64_t count, const T* table, T* out) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t element = first + i;
    const uint8_t byte = packed[element / 2];
    out[i] = table[element % 2 ? byte & 15 : byte >> 4];
  }
}

template <pyft_dtype D>
void decode_tail8(const uint8_t* packed, int64_t count, const float* codes, float scale, float zero,
                  typename Dtype<D>::type* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = Dtype<D>::store((codes[packed[i]] - zero) * scale);
}

// Calls body(first element, count, scale, zero, offset into the output) for the part of each block in [begin, end).
// Scales are made ready some blocks ahead, so that their look-ups overlap.
template <class Body>
void for_each_block(const pyft_weight& w, int64_t begin, int64_t end, const Body& body) {
  constexpr int64_t kAhead = 16;
  const int64_t size = w.block_size, last = end > begin ? (end - 1) / size : -1;
  float scale[kAhead], zero[kAhead];
  int64_t first = begin;
  for (int64_t block = begin / size; block <= last; block += kAhead) {
    const int64_t count = last - block + 1 < kAhead ? last - block + 1 : kAhead;
    for (int64_t i = 0; i < count; ++i) scale[i] = scale_at(w, block + i), zero[i] = zero_at(w, block + i);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t stop = (block + i + 1) * size < end ? (block + i + 1) * size : end;
      body(first, stop - first, scale[i], zero[i], first - begin);
      first = stop;
    }
  }
}

}  // namespace
