// Quantized weights on the GPU: scales, zero points and codes as pyft/formats.py defines them.
#pragma once

#include "device.h"

namespace pyft {

constexpr int kNestedBlock = 256;  // scales that share one nested scale
constexpr int64_t kMinBlock = 32, kMaxBlock = 4096;

// Whether blocks of this size are the same everywhere in a weight; others are whole rows.
inline bool is_flat_block(int64_t size) { return size >= kMinBlock && size <= kMaxBlock && (size & (size - 1)) == 0; }

// log2 of a power of two.
inline int log2_of(int64_t x) {
  int shift = 0;
  while (int64_t{1} << shift < x) ++shift;
  return shift;
}

// Whether the sizes of a weight are in range; its pointers are not looked at.
inline bool is_weight(const pyft_weight& weight) {
  return (weight.bits == 4 || weight.bits == 8) && weight.rows >= 0 && weight.cols >= 0 &&
         (is_flat_block(weight.block_size) || (weight.block_size == weight.cols && weight.bits * weight.cols % 8 == 0));
}

__device__ inline float scale_of(const pyft_weight& weight, int64_t block) {
  if (weight.scale_codes == nullptr) return static_cast<const float*>(weight.scales)[block];
  const float scale = weight.scale_codes[static_cast<const uint8_t*>(weight.scales)[block]];
  if (weight.nested == nullptr) return scale;
  return __fadd_rn(__fmul_rn(scale, weight.nested[block / kNestedBlock]), *weight.offset);
}

__device__ inline float zero_of(const pyft_weight& weight, int64_t block) {
  return weight.zeros == nullptr ? 0.0f : static_cast<float>(weight.zeros[block]);
}

// Code i of `codes`, which are stored as in memory: with 4 bits the first of a byte in its high nibble.
template <int kBits>
__device__ inline unsigned code_at(const uint32_t* codes, int i) {
  if (kBits == 8) return codes[i / 4] >> (i % 4 * 8) & 255;
  return codes[i / 8] >> (i % 8 / 2 * 8 + (1 - i % 2) * 4) & 15;
}

__device__ inline float decode(float code, float zero, float scale) { return __fmul_rn(__fsub_rn(code, zero), scale); }

}  // namespace pyft
