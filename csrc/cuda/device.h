// What every kernel file in this folder starts from: the CUDA headers or their stand-in on the CPU (sim.h), element
// types, wide memory accesses, launches and what became of them.
#pragma once

#include <stdint.h>

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

constexpr int64_t kMaxGrid = 0x7fffffff;  // gridDim.x of every GPU

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Exact widening, and rounding to nearest even.
__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void narrow(float x, float& out) { out = x; }
__device__ inline void narrow(float x, __half& out) { out = __float2half_rn(x); }
__device__ inline void narrow(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }

__device__ inline bool is_aligned(const void* p, unsigned bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

#ifndef PYFT_CPU_SIM
// One access of sizeof(V) bytes; the address is a multiple of that.
template <class V>
__device__ inline V load_wide(const void* from) {
  return *static_cast<const V*>(from);
}

template <class V>
__device__ inline void store_wide(void* to, V value) {
  *static_cast<V*>(to) = value;
}
#endif

}  // namespace pyft
