// Optimizers with 8-bit states: the step of one block of 256 elements, in the order of operations of
// pyft/reference/optim.py. Each instruction set compiles it for itself and brings the coding of states (`Isa`):
//
//   Maps                                  what it makes of pyft_optim_maps once a call
//   decode<kSigned>(codes, absmax, maps, out)   256 codes -> fp32
//   encode<kSigned>(x, absmax, maps, codes)     256 fp32, absmax > 0 and finite -> codes
#pragma once

#include <math.h>

#include "convert.h"

constexpr int64_t kOptimBlock = 256;

struct alignas(64) OptimScratch {
  pyft_optim_maps maps;
  alignas(64) unsigned char bytes[5120];  // what an instruction set makes of them
};

// One table per instruction set.
struct OptimKernels {
  void (*prepare)(const pyft_optim_maps& maps, OptimScratch& scratch);
  // Blocks [begin, end) of one tensor; indexed by pyft_dtype.
  void (*update[3])(const pyft_optim_tensor& tensor, int64_t begin, int64_t end, const pyft_optim_rule& rule,
                    const OptimScratch& scratch);
};

extern const OptimKernels optim_scalar;
#ifdef PYFT_X86
extern const OptimKernels optim_avx2;
extern const OptimKernels optim_vbmi;
#endif

namespace {

// Rows of pyft_optim_maps for one of the two maps.
template <bool kSigned>
const float* codes_of(const pyft_optim_maps& maps) {
  return maps.codes + (kSigned ? 0 : 2 * 256);
}
template <bool kSigned>
const float* midpoints_of(const pyft_optim_maps& maps) {
  return maps.codes + (kSigned ? 256 : 3 * 256);
}
template <bool kSigned>
const uint8_t* starts_of(const pyft_optim_maps& maps) {
  return maps.starts + (kSigned ? 0 : 2 * PYFT_OPTIM_BUCKETS);
}

// The code of 0 in each map.
template <bool kSigned>
constexpr uint8_t kZeroCode = kSigned ? 127 : 0;

constexpr uint32_t kMagnitude = 0x7FFFFFFFu, kInfinity = 0x7F800000u, kSmallest = 104u << 23;  // 2^-23

// The bits of the largest magnitude: at least kInfinity when something is not finite.
inline uint32_t largest(const float* x) {
  uint32_t bits = 0;
  for (int i = 0; i < kOptimBlock; ++i) {
    const uint32_t magnitude = bits_of(x[i]) & kMagnitude;
    bits = magnitude > bits ? magnitude : bits;
  }
  return bits;
}

// fp32 x[0 .. 256) of `count` elements and then zeros; the elements themselves where nothing need be converted.
template <pyft_dtype D, class Isa>
const float* load_block(const void* from, int64_t at, int64_t count, float* buffer) {
  const auto* values = static_cast<const typename Dtype<D>::type*>(from) + at;
  if (count == kOptimBlock) {
    if constexpr (D == PYFT_F32) return values;
    Isa::template widen<D>(values, buffer);
    return buffer;
  }
  for (int64_t i = 0; i < kOptimBlock; ++i) buffer[i] = i < count ? Dtype<D>::load(values[i]) : 0.0f;
  return buffer;
}

template <pyft_dtype D, class Isa>
void store_block(const float* block, void* to, int64_t at, int64_t count) {
  auto* values = static_cast<typename Dtype<D>::type*>(to) + at;
  if (count == kOptimBlock) return Isa::template narrow<D>(block, values);
  for (int64_t i = 0; i < count; ++i) values[i] = Dtype<D>::store(block[i]);
}

template <bool kSigned, class Isa>
void load_state(const void* state, const float* absmax, int64_t block, int64_t count, const typename Isa::Maps& maps,
                float* out) {
  const int64_t at = block * kOptimBlock;
  if (!absmax) {
    const auto* values = static_cast<const float*>(state) + at;
    for (int64_t i = 0; i < kOptimBlock; ++i) out[i] = i < count ? values[i] : 0.0f;
    return;
  }
  const auto* codes = static_cast<const uint8_t*>(state) + at;
  uint8_t padded[kOptimBlock];
  if (count < kOptimBlock) {
    for (int64_t i = 0; i < kOptimBlock; ++i) padded[i] = i < count ? codes[i] : kZeroCode<kSigned>;
    codes = padded;
  }
  Isa::template decode<kSigned>(codes, absmax[block], maps, out);
}

template <bool kSigned, class Isa>
void store_state(const float* x, uint32_t bits, void* state, float* absmax, int64_t block, int64_t count,
                 const typename Isa::Maps& maps) {
  const int64_t at = block * kOptimBlock;
  if (!absmax) {
    memcpy(static_cast<float*>(state) + at, x, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  absmax[block] = float_of(bits);
  auto* codes = static_cast<uint8_t*>(state) + at;
  if (bits == 0) {
    memset(codes, kZeroCode<kSigned>, static_cast<size_t>(count));
  } else if (count == kOptimBlock) {
    Isa::template encode<kSigned>(x, float_of(bits), maps, codes);
  } else {
    uint8_t padded[kOptimBlock];
    Isa::template encode<kSigned>(x, float_of(bits), maps, padded);
    memcpy(codes, padded, static_cast<size_t>(count));
  }
}

// m <- the new m; w <- the new v (w is v) or the direction of the step.
template <pyft_optimizer A>
void new_states(const float* __restrict p, const float* __restrict g, float* __restrict m, float* __restrict w,
                const pyft_optim_rule& rule) {
  const float sign = rule.sign, beta1 = rule.beta1, rest1 = rule.rest1, beta2 = rule.beta2, rest2 = rule.rest2;
  const float decay = rule.decay;
  const float ahead = rule.nesterov ? 1.0f : 0.0f;
  (void)p, (void)decay, (void)ahead, (void)beta2, (void)rest2;
  for (int i = 0; i < kOptimBlock; ++i) {
    const float gi = g[i] * sign;
    if constexpr (A == PYFT_ADAMW) {
      m[i] = m[i] * beta1 + gi * rest1;
      w[i] = w[i] * beta2 + (gi * rest2) * gi;
    } else if constexpr (A == PYFT_LION) {
      const float u = m[i] * beta1 + gi * rest1;
      w[i] = (u > 0.0f ? 1.0f : 0.0f) - (u < 0.0f ? 1.0f : 0.0f);
      m[i] = m[i] * beta2 + gi * rest2;
    } else {
      const float d = gi + p[i] * decay;
      m[i] = m[i] * beta1 + d * rest1;
      w[i] = ahead != 0.0f ? d + m[i] * beta1 : m[i];
    }
  }
}

template <pyft_optimizer A>
void new_parameters(const float* __restrict p, const float* __restrict m, const float* __restrict w,
                    float* __restrict out, const pyft_optim_rule& rule) {
  const float keep = rule.keep, step = rule.step, eps = rule.eps;
  for (int i = 0; i < kOptimBlock; ++i) {
    const float u = A == PYFT_ADAMW ? m[i] / (sqrtf(w[i]) + eps) : w[i];
    out[i] = p[i] * keep - u * step;
  }
}

template <class Isa, pyft_dtype D, pyft_optimizer A>
void update_blocks(const pyft_optim_tensor& t, int64_t begin, int64_t end, const pyft_optim_rule& rule,
                   const typename Isa::Maps& maps) {
  alignas(64) float p_buffer[kOptimBlock], g_buffer[kOptimBlock], m[kOptimBlock], w[kOptimBlock];
  for (int64_t block = begin; block < end; ++block) {
    const int64_t at = block * kOptimBlock;
    const int64_t count = t.n - at < kOptimBlock ? t.n - at : kOptimBlock;
    const float* p = load_block<D, Isa>(t.param, at, count, p_buffer);
    const float* g = load_block<D, Isa>(t.grad, at, count, g_buffer);
    load_state<true, Isa>(t.first, t.first_absmax, block, count, maps, m);
    if constexpr (A == PYFT_ADAMW) load_state<false, Isa>(t.second, t.second_absmax, block, count, maps, w);
    new_states<A>(p, g, m, w, rule);
    const uint32_t m_bits = largest(m), v_bits = A == PYFT_ADAMW ? largest(w) : 0;
    if (m_bits >= kInfinity || v_bits >= kInfinity) continue;
    new_parameters<A>(p, m, w, g_buffer, rule);
    store_block<D, Isa>(g_buffer, t.param, at, count);
    store_state<true, Isa>(m, m_bits, t.first, t.first_absmax, block, count, maps);
    if constexpr (A == PYFT_ADAMW) store_state<false, Isa>(w, v_bits, t.second, t.second_absmax, block, count, maps);
  }
}

template <class Isa, pyft_dtype D>
void update_tensor(const pyft_optim_tensor& t, int64_t begin, int64_t end, const pyft_optim_rule& rule,
                   const OptimScratch& scratch) {
  const auto& maps = Isa::maps_of(scratch);
  if (rule.algorithm == PYFT_ADAMW) return update_blocks<Isa, D, PYFT_ADAMW>(t, begin, end, rule, maps);
  if (rule.algorithm == PYFT_LION) return update_blocks<Isa, D, PYFT_LION>(t, begin, end, rule, maps);
  update_blocks<Isa, D, PYFT_SGD>(t, begin, end, rule, maps);
}

// What the scalar and the AVX2 code have in common: the maps as they are.
struct PlainMaps {
  using Maps = pyft_optim_maps;
  static void prepare(const pyft_optim_maps& maps, OptimScratch& scratch) { scratch.maps = maps; }
  static const Maps& maps_of(const OptimScratch& scratch) { return scratch.maps; }
};

}  // namespace
