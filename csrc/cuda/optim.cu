// One step of AdamW, Lion or SGD with 8-bit states over many tensors: the equations, the order of operations and the
// coding of states of pyft/reference/optim.py, bit for bit.
//
// A warp works on one quantization block of 256 elements, a lane on 8 of them; for parameters of T
//
//   part 0                              part 1 (fp32 only)
//   | lane 0 | lane 1 | ... | lane 31 | lane 0 | lane 1 | ... | lane 31 |      kWide<T> = 16 bytes of elements each
//
// so that each access of parameters and gradients is 16 bytes a lane and whole 32-byte sectors a warp. A thread block
// has a run of consecutive blocks of all tensors; its warps take them in turn, and find their tensor by bisection once.
//
// Bytes moved for each element, AdamW: 16 with fp32 parameters, 10 with 16-bit ones, and 16 bytes for every 256
// elements; Lion and SGD 14 and 8. The maps and the encoder's first look-up, 13 KB, are in shared memory.
//
// Divisions and square roots are IEEE; products and sums use the _rn intrinsics, which the compiler never contracts.
#include <string.h>

#include "device.h"

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kBlock = 256;  // elements that share an absmax
constexpr int kLane = kBlock / 32;
constexpr uint32_t kMagnitude = 0x7fffffffu, kInfinity = 0x7f800000u, kSmallest = 104u << 23;  // 2^-23
constexpr int kStartWords = 3 * PYFT_OPTIM_BUCKETS / 4;

template <bool kSigned>
constexpr int kZeroCode = kSigned ? 127 : 0;

// The maps of pyft_optim_maps in shared memory.
struct Maps {
  const float* codes;
  const uint8_t* starts;
};

template <int kBytes>
struct Word;
template <>
struct Word<4> {
  using type = unsigned;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// One access of sizeof(V) bytes to global memory, which the compiler cannot tell an address read from a table is in.
template <class V>
__device__ V fetch(const V* from) {
#ifdef PYFT_CPU_SIM
  return pyft::load_wide<V>(from);
#else
  return __ldcg(from);
#endif
}

// kN values; `fill` from `left` on.
template <class T, int kN>
__device__ void load(const T* from, int64_t left, T fill, T (&out)[kN]) {
  constexpr int kBytes = kN * static_cast<int>(sizeof(T)), kStep = kBytes < 16 ? kBytes : 16;
  using V = typename Word<kStep>::type;
  if (left >= kN && pyft::is_aligned(from, kStep)) {
#pragma unroll
    for (int i = 0; i < kN; i += kStep / static_cast<int>(sizeof(T))) {
      const V wide = fetch(reinterpret_cast<const V*>(from + i));
      memcpy(out + i, &wide, sizeof wide);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kN; ++i) out[i] = i < left ? fetch(from + i) : fill;
  }
}

// kN values; nothing from `left` on.
template <class T, int kN>
__device__ void store(T* to, int64_t left, const T (&x)[kN]) {
  constexpr int kBytes = kN * static_cast<int>(sizeof(T)), kStep = kBytes < 16 ? kBytes : 16;
  using V = typename Word<kStep>::type;
  if (left >= kN && pyft::is_aligned(to, kStep)) {
#pragma unroll
    for (int i = 0; i < kN; i += kStep / static_cast<int>(sizeof(T))) {
      V wide;
      memcpy(&wide, x + i, sizeof wide);
      pyft::store_wide<V>(to + i, wide);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      if (i < left) pyft::store_wide<T>(to + i, x[i]);
    }
  }
}

// The code of x in a block whose absmax is above 0.
template <bool kSigned>
__device__ int encode(float x, float absmax, const Maps& maps) {
  const float scaled = __fdiv_rn(x, absmax);
  const uint32_t bits = __float_as_uint(scaled), magnitude = bits & kMagnitude;
  uint32_t bucket = ((magnitude > kSmallest ? magnitude : kSmallest) - kSmallest) >> (23 - PYFT_OPTIM_MANTISSA);
  if (!kSigned) bucket += 2 * PYFT_OPTIM_BUCKETS;
  if (kSigned && bits > kMagnitude) bucket += PYFT_OPTIM_BUCKETS;
  const int start = maps.starts[bucket];
  const int code = start + (scaled > maps.codes[(kSigned ? 256 : 3 * 256) + start]);
  return !kSigned && code == 0 && x > 0.0f ? 1 : code;
}

template <bool kSigned, int kN>
__device__ void load_state(const void* state, const float* absmax, int64_t block, int64_t at, int64_t left,
                           const Maps& maps, float (&out)[kN]) {
  if (absmax == nullptr) return load<float, kN>(static_cast<const float*>(state) + at, left, 0.0f, out);
  uint8_t code[kN];
  load<uint8_t, kN>(static_cast<const uint8_t*>(state) + at, left, kZeroCode<kSigned>, code);
  const float scale = fetch(absmax + block);
#pragma unroll
  for (int i = 0; i < kN; ++i) out[i] = __fmul_rn(maps.codes[(kSigned ? 0 : 2 * 256) + code[i]], scale);
}

template <bool kSigned, int kN>
__device__ void store_state(const float (&x)[kN], uint32_t bits, void* state, bool coded, int64_t at, int64_t left,
                            const Maps& maps) {
  if (!coded) return store<float, kN>(static_cast<float*>(state) + at, left, x);
  uint8_t code[kN];
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    code[i] = static_cast<uint8_t>(bits == 0 ? kZeroCode<kSigned> : encode<kSigned>(x[i], __uint_as_float(bits), maps));
  }
  store<uint8_t, kN>(static_cast<uint8_t*>(state) + at, left, code);
}

__device__ uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

__device__ uint32_t warp_max(uint32_t bits) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) bits = larger(bits, __shfl_xor_sync(0xffffffffu, bits, lanes));
  return bits;
}

__device__ float blend(float a, float x, float b, float y) { return __fadd_rn(__fmul_rn(a, x), __fmul_rn(b, y)); }

// m <- the new m; w <- the new v (w is v) or the direction of the step.
template <pyft_optimizer A>
__device__ void new_states(float p, float g, float& m, float& w, const pyft_optim_rule& rule) {
  g = __fmul_rn(g, rule.sign);
  if (A == PYFT_ADAMW) {
    m = blend(m, rule.beta1, g, rule.rest1);
    w = __fadd_rn(__fmul_rn(w, rule.beta2), __fmul_rn(__fmul_rn(g, rule.rest2), g));
  } else if (A == PYFT_LION) {
    const float u = blend(m, rule.beta1, g, rule.rest1);
    w = static_cast<float>((u > 0.0f) - (u < 0.0f));
    m = blend(m, rule.beta2, g, rule.rest2);
  } else {
    const float d = __fadd_rn(g, __fmul_rn(p, rule.decay));
    m = blend(m, rule.beta1, d, rule.rest1);
    w = rule.nesterov ? __fadd_rn(d, __fmul_rn(m, rule.beta1)) : m;
  }
}

template <pyft_optimizer A>
__device__ float new_parameter(float p, float m, float w, const pyft_optim_rule& rule) {
  const float u = A == PYFT_ADAMW ? __fdiv_rn(m, __fadd_rn(__fsqrt_rn(w), rule.eps)) : w;
  return __fsub_rn(__fmul_rn(p, rule.keep), __fmul_rn(u, rule.step));
}

// One quantization block of tensor t, by one warp.
template <class T, pyft_optimizer A>
__device__ void update_block(const pyft_optim_tensor& t, int64_t block, const pyft_optim_rule& rule, const Maps& maps) {
  constexpr int kN = pyft::kWide<T>, kParts = kLane / kN;
  const int64_t first = block * kBlock + threadIdx.x % 32 * kN;
  float p[kParts][kN], m[kParts][kN], w[kParts][kN];
  uint32_t m_bits = 0, v_bits = 0;
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const int64_t at = first + part * 32 * kN, left = t.n - at;
    T raw_p[kN], raw_g[kN];
    load<T, kN>(static_cast<const T*>(t.param) + at, left, T{}, raw_p);
    load<T, kN>(static_cast<const T*>(t.grad) + at, left, T{}, raw_g);
    load_state<true, kN>(t.first, t.first_absmax, block, at, left, maps, m[part]);
    if (A == PYFT_ADAMW) load_state<false, kN>(t.second, t.second_absmax, block, at, left, maps, w[part]);
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      p[part][i] = pyft::widen(raw_p[i]);
      new_states<A>(p[part][i], pyft::widen(raw_g[i]), m[part][i], w[part][i], rule);
      m_bits = larger(m_bits, __float_as_uint(m[part][i]) & kMagnitude);
      if (A == PYFT_ADAMW) v_bits = larger(v_bits, __float_as_uint(w[part][i]) & kMagnitude);
    }
  }
  m_bits = warp_max(m_bits);
  if (A == PYFT_ADAMW) v_bits = warp_max(v_bits);
  if (larger(m_bits, v_bits) >= kInfinity) return;

#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const int64_t at = first + part * 32 * kN, left = t.n - at;
#pragma unroll
    for (int i = 0; i < kN; ++i) p[part][i] = new_parameter<A>(p[part][i], m[part][i], w[part][i], rule);
    T* to = static_cast<T*>(t.param) + at;
    if (left >= kN && pyft::is_aligned(to, 16)) {
      pyft::store_wide<uint4>(to, pyft::narrow_wide<T>(p[part]));
    } else {
#pragma unroll
      for (int i = 0; i < kN; ++i) {
        T narrowed;
        pyft::narrow(p[part][i], narrowed);
        if (i < left) pyft::store_wide<T>(to + i, narrowed);
      }
    }
    store_state<true, kN>(m[part], m_bits, t.first, t.first_absmax != nullptr, at, left, maps);
    if (A == PYFT_ADAMW) store_state<false, kN>(w[part], v_bits, t.second, t.second_absmax != nullptr, at, left, maps);
  }
  if (threadIdx.x % 32 == 0) {
    if (t.first_absmax != nullptr) pyft::store_wide<float>(t.first_absmax + block, __uint_as_float(m_bits));
    if (A == PYFT_ADAMW && t.second_absmax != nullptr) {
      pyft::store_wide<float>(t.second_absmax + block, __uint_as_float(v_bits));
    }
  }
}

// Copies row `at` of the table for a warp; the block at which the next tensor begins.
__device__ int64_t load_row(const pyft_optim_tensor* tensors, int64_t at, int64_t count, int64_t blocks,
                            pyft_optim_tensor& row) {
  constexpr int kWords = sizeof(pyft_optim_tensor) / sizeof(uint2);
  const int lane = threadIdx.x % 32;
  __syncwarp();
  if (lane < kWords) {
    const uint2 word = fetch(reinterpret_cast<const uint2*>(tensors + at) + lane);
    memcpy(reinterpret_cast<uint2*>(&row) + lane, &word, sizeof word);
  }
  __syncwarp();
  return at + 1 < count ? tensors[at + 1].block : blocks;
}

template <class T, pyft_optimizer A>
__global__ void __launch_bounds__(kThreads, 3)
    optim(const pyft_optim_tensor* tensors, int64_t count, int64_t blocks, pyft_optim_rule rule, pyft_optim_maps maps) {
  PYFT_SHARED(float, codes, 4 * 256);
  PYFT_SHARED(uint32_t, starts, kStartWords);
  PYFT_SHARED(pyft_optim_tensor, rows, kWarps);
  for (int i = threadIdx.x; i < 4 * 256; i += kThreads) codes[i] = maps.codes[i];
  const auto* words = reinterpret_cast<const uint32_t*>(maps.starts);
  for (int i = threadIdx.x; i < kStartWords; i += kThreads) starts[i] = words[i];
  __syncthreads();
  const Maps shared = {codes, reinterpret_cast<const uint8_t*>(starts)};

  const int64_t share = pyft::ceil_div(blocks, gridDim.x), begin = blockIdx.x * share;
  const int64_t end = begin + share < blocks ? begin + share : blocks;
  int64_t block = begin + threadIdx.x / 32;
  if (block >= end) return;
  int64_t at = 0;  // the last tensor that begins at or before `block`
  for (int64_t above = count; above - at > 1;) {
    const int64_t middle = (at + above) / 2;
    (tensors[middle].block <= block ? at : above) = middle;
  }
  // The row of the table at hand, out of the way of the registers.
  pyft_optim_tensor& tensor = rows[threadIdx.x / 32];
  int64_t next = load_row(tensors, at, count, blocks, tensor);
  for (; block < end; block += kWarps) {
    while (block >= next) next = load_row(tensors, ++at, count, blocks, tensor);
    update_block<T, A>(tensor, block - tensor.block, rule, shared);
  }
}

// ---- launcher -------------------------------------------------------------------------------------------------------

template <class T>
auto kernel_of(pyft_optimizer algorithm) {
  return algorithm == PYFT_ADAMW  ? optim<T, PYFT_ADAMW>
         : algorithm == PYFT_LION ? optim<T, PYFT_LION>
                                  : optim<T, PYFT_SGD>;
}

}  // namespace

extern "C" {

pyft_status pyft_cuda_optim(const pyft_optim_tensor* tensors, int64_t count, int64_t blocks, pyft_dtype dtype,
                            const pyft_optim_rule* rule, const pyft_optim_maps* maps, int grid, void* stream) {
  if (count < 0 || blocks < count || grid < 1 || !pyft::is_dtype(dtype)) return PYFT_BAD_ARGUMENT;
  if (rule->algorithm < PYFT_ADAMW || rule->algorithm > PYFT_SGD) return PYFT_BAD_ARGUMENT;
  if (reinterpret_cast<uintptr_t>(maps->starts) % 4) return PYFT_BAD_ARGUMENT;
  if (count == 0) return PYFT_OK;
  const int64_t needed = pyft::ceil_div(blocks, kWarps);
  const auto thread_blocks = static_cast<unsigned>(needed < grid ? needed : grid);
  return pyft::with_type(dtype, [&](auto type) {
    const auto kernel = kernel_of<decltype(type)>(rule->algorithm);
    PYFT_LAUNCH(kernel, thread_blocks, kThreads, static_cast<cudaStream_t>(stream), tensors, count, blocks, *rule,
                *maps);
    return pyft::launch_status();
  });
}

}  // extern "C"
