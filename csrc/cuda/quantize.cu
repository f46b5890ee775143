// Block-wise quantization: the layout and the rules of pyft/formats.py, bit for bit.
//
//   |<----------------- block: `group` neighbouring threads of one thread block ----------------->|
//   | chunk | chunk | chunk | ...     a thread has one chunk of a flat block, every group-th of a row
//
// Bytes moved per element with 16-bit weights and 4 bits: 2 read, 0.5 written, 4 / block_size of scale. A row is read
// a second time to be coded; up to some 100 KB of it come from the L1 cache. Arithmetic per element: an IEEE division
// (about 10 instructions) and a binary search among the thresholds in shared memory, 4 or 8 steps of a load, a
// comparison and a selection. The 15 thresholds of 4 bits lie in 15 banks, so that those loads never conflict.
//
// Divisions are IEEE; sums use the _rn intrinsics, which the compiler never contracts.
#include "weight.h"

namespace {

constexpr int kChunk = 8;
constexpr int kThreads = 256;     // a thread block, wherever the quantization block does not ask for more
constexpr int kMaxThreads = 512;  // block_size 4096

// The number of `thresholds` (ascending, 2^kBits - 1 of them) strictly below x; 0 for NaN.
template <int kBits>
__device__ int level_of(float x, const float* thresholds) {
  int level = 0;
#pragma unroll
  for (int step = 1 << (kBits - 1); step > 0; step /= 2) {
    if (x > thresholds[level + step - 1]) level += step;
  }
  return level;
}

__device__ uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

// How far a block reaches above and below zero, as bits of |x|. Their order as unsigned integers is that of |x|, with
// NaN on top: a maximum keeps NaN.
struct Reach {
  uint32_t above, below;

  __device__ void add(float x) {
    const uint32_t bits = __float_as_uint(x) & 0x7fffffffu;
    if (!(x <= 0.0f)) above = larger(above, bits);
    if (!(x >= 0.0f)) below = larger(below, bits);
  }

  __device__ void add(const Reach& other) {
    above = larger(above, other.above);
    below = larger(below, other.below);
  }
};

// What the `group` neighbouring threads (a power of two) that this one belongs to reach together. Every thread of the
// thread block calls it, once; warps has a place for each warp.
__device__ Reach reach_of_group(Reach reach, int group, Reach* warps) {
  for (int lanes = (group < 32 ? group : 32) / 2; lanes > 0; lanes /= 2) {
    const uint32_t above = __shfl_xor_sync(0xffffffffu, reach.above, lanes);
    const uint32_t below = __shfl_xor_sync(0xffffffffu, reach.below, lanes);
    reach.add({above, below});
  }
  if (group <= 32) return reach;
  const int warp = threadIdx.x / 32, count = group / 32;
  if (threadIdx.x % 32 == 0) warps[warp] = reach;
  __syncthreads();
  const int first = warp / count * count;
  for (int i = 0; i < count; ++i) reach.add(warps[first + i]);
  return reach;
}

// `count` elements of x, then zeros. 16-byte loads where the address and the count allow.
template <class T>
__device__ void load_chunk(const T* x, int count, float (&out)[kChunk]) {
  T raw[kChunk];
  if (count == kChunk && pyft::is_aligned(x, 16)) {
#pragma unroll
    for (int i = 0; i < kChunk; i += pyft::kWide<T>) {
      const uint4 wide = pyft::load_wide<uint4>(x + i);
      memcpy(raw + i, &wide, sizeof wide);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (i < count) raw[i] = x[i];
    }
  }
#pragma unroll
  for (int i = 0; i < kChunk; ++i) out[i] = i < count ? pyft::widen(raw[i]) : 0.0f;
}

// The codes of `count` elements from packed's `element` on; with 4 bits both are even, or the last code is a filler.
template <int kBits>
__device__ void store_codes(const uint8_t (&code)[kChunk], int count, uint8_t* to) {
  constexpr int kBytes = kChunk * kBits / 8;
  uint32_t word[kBytes / 4] = {};
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const int shift = kBits == 8 ? i % 4 * 8 : i / 2 * 8 + (1 - i % 2) * 4;
    word[i * kBits / 32] |= uint32_t{code[i]} << shift;
  }
  if (count == kChunk && pyft::is_aligned(to, kBytes)) {
    if constexpr (kBytes == 8) {
      pyft::store_wide<uint2>(to, {word[0], word[1]});
    } else {
      pyft::store_wide<uint32_t>(to, word[0]);
    }
    return;
  }
  const int bytes = (count * kBits + 7) / 8;
#pragma unroll
  for (int i = 0; i < kBytes; ++i) {
    if (i < bytes) to[i] = static_cast<uint8_t>(word[i / 4] >> (i % 4 * 8));
  }
}

__device__ float power_of_two(uint32_t e8m0) {
  return __uint_as_float(e8m0 == 0 ? 0x00400000u : e8m0 == 255 ? 0x7fc00000u : e8m0 << 23);
}

// Zero point of a block that reaches `below` under zero.
__device__ int zero_point(float below, float scale, int largest) {
  const float zero = __fdiv_rn(below, scale);
  if (!(zero < __uint_as_float(0x7f800000u))) return 0;  // infinity and NaN
  return zero >= largest ? largest : __float2int_rn(zero);
}

// x [n] -> packed, scales, zeros, by blocks of block_size elements, each the work of 2^group_shift threads. kRow: a
// thread has any number of chunks of its block; else one.
template <class T, int kBits, bool kRow>
__global__ void __launch_bounds__(kMaxThreads)
    quantize(const T* x, int64_t n, int64_t block_size, int group_shift, pyft_coding coding, uint8_t* packed,
             void* scales, uint8_t* zeros) {
  constexpr int kLevels = 1 << kBits;
  PYFT_SHARED(float, thresholds, kLevels);
  PYFT_SHARED(uint8_t, order, kLevels);
  PYFT_SHARED(Reach, warps, kMaxThreads / 32);
  if (threadIdx.x < kLevels) {
    if (threadIdx.x < kLevels - 1) thresholds[threadIdx.x] = coding.thresholds[threadIdx.x];
    order[threadIdx.x] = coding.order[threadIdx.x];
  }
  __syncthreads();

  const int group = 1 << group_shift, rank = threadIdx.x & (group - 1);
  const int64_t block = int64_t{blockIdx.x} * (blockDim.x >> group_shift) + (threadIdx.x >> group_shift);
  const int64_t first = block * block_size + rank * kChunk, step = int64_t{group} * kChunk;
  const int64_t end = n - block * block_size < block_size ? n : (block + 1) * block_size;
  float value[kChunk];
  Reach reach = {0, 0};
  for (int64_t at = first; at < end; at += step) {
    load_chunk(x + at, end - at < kChunk ? static_cast<int>(end - at) : kChunk, value);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) reach.add(value[i]);
    if (!kRow) break;
  }
  reach = reach_of_group(reach, group, warps);
  if (first >= end) return;

  const float above = __uint_as_float(reach.above), below = __uint_as_float(reach.below);
  const float span = zeros != nullptr ? __fadd_rn(above, below) : __uint_as_float(larger(reach.above, reach.below));
  float scale = __fdiv_rn(span, coding.top);
  int zero = 0;
  if (coding.e8m0) {
    const uint32_t exponent = __float_as_uint(scale) >> 23 & 255;
    scale = power_of_two(exponent);
    if (rank == 0) static_cast<uint8_t*>(scales)[block] = static_cast<uint8_t>(exponent);
  } else {
    if (rank == 0) static_cast<float*>(scales)[block] = scale;
  }
  if (zeros != nullptr) {
    zero = zero_point(below, scale, kLevels - 1);
    if (rank == 0) zeros[block] = static_cast<uint8_t>(zero);
  }
  const float shift = static_cast<float>(zero);
  const uint8_t zero_code = static_cast<uint8_t>(coding.zero_code);
  for (int64_t at = first; at < end; at += step) {
    const int count = end - at < kChunk ? static_cast<int>(end - at) : kChunk;
    if (kRow) load_chunk(x + at, count, value);
    uint8_t code[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const float scaled = __fadd_rn(__fdiv_rn(value[i], scale), shift);
      code[i] = scale == 0.0f || i >= count ? zero_code : order[level_of<kBits>(scaled, thresholds)];
    }
    store_codes<kBits>(code, count, packed + at * kBits / 8);
    if (!kRow) break;
  }
}

// ---- launchers ------------------------------------------------------------------------------------------------------

template <class T, int kBits>
pyft_status launch(const T* x, int64_t n, int64_t block_size, const pyft_coding& coding, uint8_t* packed, void* scales,
                   uint8_t* zeros, cudaStream_t stream) {
  const bool flat = pyft::is_flat_block(block_size);
  const int64_t chunks = pyft::ceil_div(block_size, kChunk);
  const int group_shift = pyft::log2_of(flat || chunks < kThreads ? chunks : kThreads);
  const int64_t threads = group_shift > pyft::log2_of(kThreads) ? int64_t{1} << group_shift : kThreads;
  const int64_t grid = pyft::ceil_div(pyft::ceil_div(n, block_size), threads >> group_shift);
  if (grid > pyft::kMaxGrid) return PYFT_BAD_ARGUMENT;
  const auto kernel = flat ? quantize<T, kBits, false> : quantize<T, kBits, true>;
  PYFT_LAUNCH(kernel, static_cast<unsigned>(grid), static_cast<unsigned>(threads), stream, x, n, block_size,
              group_shift, coding, packed, scales, zeros);
  return pyft::launch_status();
}

}  // namespace

extern "C" pyft_status pyft_cuda_quantize(const void* x, pyft_dtype dtype, int64_t n, int64_t block_size,
                                          const pyft_coding* coding, uint8_t* packed, void* scales, uint8_t* zeros,
                                          void* stream) {
  const int bits = coding->bits;
  if ((bits != 4 && bits != 8) || coding->zero_code < 0 || coding->zero_code >> bits) return PYFT_BAD_ARGUMENT;
  if (n == 0) return pyft::is_dtype(dtype) ? PYFT_OK : PYFT_BAD_ARGUMENT;
  const bool rows = block_size > 0 && n % block_size == 0 && block_size * bits % 8 == 0;
  if (n < 0 || !(pyft::is_flat_block(block_size) || rows)) return PYFT_BAD_ARGUMENT;
  return pyft::with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const auto kernel = bits == 4 ? launch<T, 4> : launch<T, 8>;
    return kernel(static_cast<const T*>(x), n, block_size, *coding, packed, scales, zeros,
                  static_cast<cudaStream_t>(stream));
  });
}
