// What every kernel file in this folder starts from: the CUDA headers or their stand-in on the CPU (sim.h), element
// types, wide memory accesses, launches and what became of them.
#pragma once

#include <stdint.h>
#include <string.h>

#include "../pyft.h"

#ifdef PYFT_CPU_SIM
#include "sim.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
// type name[n], shared by the threads of a block.
#define PYFT_SHARED(type, name, n) __shared__ type name[n]
#define PYFT_LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#endif

namespace pyft {

// The status of the launch just made; keeps the error for pyft_cuda_error_string. Does not wait for the kernel.
pyft_status launch_status();

inline bool is_dtype(pyft_dtype dtype) { return dtype == PYFT_F32 || dtype == PYFT_F16 || dtype == PYFT_BF16; }

// run(a value of the type that dtype names), a status.
template <class Run>
pyft_status with_type(pyft_dtype dtype, const Run& run) {
  if (dtype == PYFT_F32) return run(float{});
  if (dtype == PYFT_F16) return run(__half{});
  if (dtype == PYFT_BF16) return run(__nv_bfloat16{});
  return PYFT_BAD_ARGUMENT;
}

constexpr int64_t kMaxGrid = 0x7fffffff;  // gridDim.x of every GPU

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Exact widening, and rounding to nearest even.
__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void narrow(float x, float& out) { out = x; }
__device__ inline void narrow(float x, __half& out) { out = __float2half_rn(x); }
__device__ inline void narrow(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }

// Two values rounded as above side by side in a word, the first in its low half.
template <class T>
__device__ uint32_t narrow_pair(float low, float high);

template <>
__device__ inline uint32_t narrow_pair<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t word;
  memcpy(&word, &pair, sizeof word);
  return word;
}

template <>
__device__ inline uint32_t narrow_pair<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t word;
  memcpy(&word, &pair, sizeof word);
  return word;
}

// Two values rounded to T and widened again.
template <class T>
__device__ inline void round_pair(float& low, float& high) {
  const uint32_t word = narrow_pair<T>(low, high);
  T pair[2];
  memcpy(pair, &word, sizeof pair);
  low = widen(pair[0]);
  high = widen(pair[1]);
}

template <>
__device__ inline void round_pair<float>(float&, float&) {}

// How many elements a 16-byte access has.
template <class T>
constexpr int kWide = 16 / static_cast<int>(sizeof(T));

// 16 bytes of T, each rounded as above.
template <class T>
__device__ inline uint4 narrow_wide(const float (&x)[kWide<T>]) {
  return {narrow_pair<T>(x[0], x[1]), narrow_pair<T>(x[2], x[3]), narrow_pair<T>(x[4], x[5]),
          narrow_pair<T>(x[6], x[7])};
}

template <>
__device__ inline uint4 narrow_wide<float>(const float (&x)[4]) {
  return {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])};
}

__host__ __device__ inline bool is_aligned(const void* p, unsigned bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

#ifndef PYFT_CPU_SIM
// One access of sizeof(V) bytes; the address is a multiple of that. Stores are to global memory: written as a plain
// assignment, one of a vector may become several narrow ones.
template <class V>
__device__ inline V load_wide(const void* from) {
  return *static_cast<const V*>(from);
}

template <class V>
__device__ inline void store_wide(void* to, V value) {
  __stcg(static_cast<V*>(to), value);
}
#endif

}  // namespace pyft
