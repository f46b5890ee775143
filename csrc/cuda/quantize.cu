// Block-wise 4-bit quantization and its inverse: the layout and the rules of pyft/formats.py, bit for bit.
//
// A thread works on one chunk of kChunk consecutive elements, which lies in one quantization block wherever chunks
// start at multiples of kChunk: 16 or 32 bytes of weights on one side, 4 packed bytes on the other.
//
//   quantize4         |<------- quantization block: 4 .. 512 threads of one thread block ------->|
//                     | chunk | chunk | chunk | ...                                              |
//   dequantize4       threadIdx.x counts chunks along a row, threadIdx.y rows
//
// Divisions are IEEE; products and sums use the _rn intrinsics, which the compiler never contracts into an FMA.
#include <string.h>

#include "device.h"

namespace {

constexpr int kChunk = 8;
constexpr int kThreads = 256;      // a thread block, wherever the quantization block does not ask for more
constexpr int kMaxThreads = 512;   // block_size 4096
constexpr int kNestedBlock = 256;  // absmax values that share one nested absmax

// The number of `midpoints` (ascending, 2^kBits - 1 of them) strictly below x; 0 for NaN.
template <int kBits>
__device__ int encode(float x, const float* midpoints) {
  int code = 0;
#pragma unroll
  for (int step = 1 << (kBits - 1); step > 0; step /= 2) {
    if (x > midpoints[code + step - 1]) code += step;
  }
  return code;
}

// Bits whose order as unsigned integers is that of |x|, with NaN above infinity: a maximum over them keeps NaN.
__device__ uint32_t magnitude_bits(float x) { return __float_as_uint(x) & 0x7fffffffu; }

__device__ uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

// The maximum of `bits` over the `group` neighbouring threads (a power of two) that this one belongs to. Every thread
// of the thread block calls it; warp_max has a place for each of its warps.
__device__ uint32_t group_max(uint32_t bits, int group, uint32_t* warp_max) {
  for (int lanes = (group < 32 ? group : 32) / 2; lanes > 0; lanes /= 2) {
    bits = larger(bits, __shfl_xor_sync(0xffffffffu, bits, lanes));
  }
  if (group <= 32) return bits;
  const int warp = threadIdx.x / 32, warps = group / 32;
  if (threadIdx.x % 32 == 0) warp_max[warp] = bits;
  __syncthreads();
  const int first = warp / warps * warps;
  for (int i = 0; i < warps; ++i) bits = larger(bits, warp_max[first + i]);
  return bits;
}

// `count` elements of x, then zeros. 16-byte loads where the address and the count allow.
template <class T>
__device__ void load_chunk(const T* x, int count, float (&out)[kChunk]) {
  T raw[kChunk];
  if (count == kChunk && pyft::is_aligned(x, 16)) {
    constexpr int kLanes = 16 / sizeof(T);
#pragma unroll
    for (int i = 0; i < kChunk; i += kLanes) {
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

// x [n] -> packed [ceil(n / 2)], absmax [ceil(n / (kChunk * block_threads))]; block_threads = 2^block_shift threads
// hold one quantization block.
template <class T>
__global__ void __launch_bounds__(kMaxThreads) quantize4(const T* x, int64_t n, int block_shift, const float* midpoints,
                                                         int zero_code, uint8_t* packed, float* absmax) {
  PYFT_SHARED(float, table, 15);
  PYFT_SHARED(uint32_t, warp_max, kMaxThreads / 32);
  if (threadIdx.x < 15) table[threadIdx.x] = midpoints[threadIdx.x];
  __syncthreads();

  const int64_t chunk = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t left = n - chunk * kChunk;
  const int count = left >= kChunk ? kChunk : left > 0 ? static_cast<int>(left) : 0;
  float value[kChunk];
  load_chunk(x + chunk * kChunk, count, value);
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) bits = larger(bits, magnitude_bits(value[i]));
  bits = group_max(bits, 1 << block_shift, warp_max);
  if (count == 0) return;

  const float scale = __uint_as_float(bits);
  if ((threadIdx.x & ((1 << block_shift) - 1)) == 0) absmax[chunk >> block_shift] = scale;
  uint32_t word = 0;  // byte i: element 2i in the high nibble, 2i + 1 in the low one
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const int code = bits == 0 ? zero_code : encode<4>(__fdiv_rn(value[i], scale), table);
    word |= static_cast<uint32_t>(code) << (i / 2 * 8 + (1 - i % 2) * 4);
  }
  uint8_t* to = packed + chunk * (kChunk / 2);
  if (count == kChunk && pyft::is_aligned(to, 4)) {
    pyft::store_wide<uint32_t>(to, word);
  } else {
    for (int i = 0; i < (count + 1) / 2; ++i) to[i] = static_cast<uint8_t>(word >> (8 * i));
  }
}

// x [n] less *offset -> codes [n], absmax [ceil(n / kNestedBlock)]; one thread block each kNestedBlock elements.
__global__ void __launch_bounds__(kNestedBlock)
    quantize_absmax(const float* x, int64_t n, const float* offset, const float* midpoints, int zero_code,
                    uint8_t* codes, float* absmax) {
  PYFT_SHARED(float, table, 255);
  PYFT_SHARED(uint32_t, warp_max, kNestedBlock / 32);
  if (threadIdx.x < 255) table[threadIdx.x] = midpoints[threadIdx.x];

  const int64_t i = int64_t{blockIdx.x} * kNestedBlock + threadIdx.x;
  const float value = i < n ? __fsub_rn(x[i], *offset) : 0.0f;
  static_assert(kNestedBlock > 32, "then group_max has a barrier, after which the table is there too");
  const uint32_t bits = group_max(magnitude_bits(value), kNestedBlock, warp_max);
  const float scale = __uint_as_float(bits);
  if (threadIdx.x == 0) absmax[blockIdx.x] = scale;
  if (i < n) codes[i] = static_cast<uint8_t>(bits == 0 ? zero_code : encode<8>(__fdiv_rn(value, scale), table));
}

__device__ float absmax_of(const pyft_weight4& weight, int64_t block) {
  if (weight.nested == nullptr) return static_cast<const float*>(weight.absmax)[block];
  const int code = static_cast<const uint8_t*>(weight.absmax)[block];
  return __fadd_rn(__fmul_rn(weight.absmax_codes[code], weight.nested[block / kNestedBlock]), *weight.offset);
}

// `runs` runs of `length` elements: run r begins at element first + r * length of the weight and at out + r * stride.
struct Slab {
  int64_t first, runs, length, stride;
};

// One chunk a thread; block_shift = log2(weight.block_size), tiles = thread blocks along a run.
template <class T>
__global__ void __launch_bounds__(kThreads)
    dequantize4(pyft_weight4 weight, Slab slab, int block_shift, unsigned tiles, T* out) {
  PYFT_SHARED(float, table, 16);
  const unsigned thread = threadIdx.y * blockDim.x + threadIdx.x;
  if (thread < 16) table[thread] = weight.codes[thread];
  __syncthreads();

  const int64_t run = int64_t{blockIdx.x / tiles} * blockDim.y + threadIdx.y;
  const int64_t column = (int64_t{blockIdx.x % tiles} * blockDim.x + threadIdx.x) * kChunk;
  if (run >= slab.runs || column >= slab.length) return;
  const int64_t element = slab.first + run * slab.length + column;
  const uint8_t* from = weight.packed + element / 2;
  out += run * slab.stride + column;

  if (slab.length - column >= kChunk && element % kChunk == 0 && pyft::is_aligned(from, 4) &&
      pyft::is_aligned(out, 16)) {
    const uint32_t word = pyft::load_wide<uint32_t>(from);
    const float scale = absmax_of(weight, element >> block_shift);
    T raw[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      pyft::narrow(__fmul_rn(table[word >> (i / 2 * 8 + (1 - i % 2) * 4) & 15], scale), raw[i]);
    }
    constexpr int kLanes = 16 / sizeof(T);
#pragma unroll
    for (int i = 0; i < kChunk; i += kLanes) {
      uint4 wide;
      memcpy(&wide, raw + i, sizeof wide);
      pyft::store_wide<uint4>(out + i, wide);
    }
    return;
  }

  const int count = slab.length - column < kChunk ? static_cast<int>(slab.length - column) : kChunk;
  float scale = 0.0f;
  for (int i = 0; i < count; ++i) {
    const int64_t e = element + i;
    if (i == 0 || (e & ((int64_t{1} << block_shift) - 1)) == 0) scale = absmax_of(weight, e >> block_shift);
    const int code = e % 2 ? weight.packed[e / 2] & 15 : weight.packed[e / 2] >> 4;
    pyft::narrow(__fmul_rn(table[code], scale), out[i]);
  }
}

// ---- launchers ------------------------------------------------------------------------------------------------------

// log2 of a power of two.
int log2_of(int64_t x) {
  int shift = 0;
  while (int64_t{1} << shift < x) ++shift;
  return shift;
}

bool is_block_size(int64_t size) { return size >= 32 && size <= 4096 && (size & (size - 1)) == 0; }

template <class T>
pyft_status launch_quantize4(const void* x, int64_t n, int64_t block_size, const float* midpoints, int zero_code,
                             uint8_t* packed, float* absmax, cudaStream_t stream) {
  const int64_t block_threads = block_size / kChunk;
  const int64_t threads = block_threads > kThreads ? block_threads : kThreads;
  const int64_t grid = pyft::ceil_div(n, threads * kChunk);
  if (grid > pyft::kMaxGrid) return PYFT_BAD_ARGUMENT;
  PYFT_LAUNCH(quantize4<T>, static_cast<unsigned>(grid), static_cast<unsigned>(threads), stream,
              static_cast<const T*>(x), n, log2_of(block_threads), midpoints, zero_code, packed, absmax);
  return pyft::launch_status();
}

template <class T>
pyft_status launch_dequantize4(const pyft_weight4& weight, const Slab& slab, void* out, cudaStream_t stream) {
  const int64_t chunks = pyft::ceil_div(slab.length, kChunk);
  const int64_t along = chunks < kThreads ? int64_t{1} << log2_of(chunks) : kThreads;  // threads along a run
  const int64_t tiles = pyft::ceil_div(chunks, along);
  const int64_t groups = pyft::ceil_div(slab.runs, kThreads / along);
  if (tiles > pyft::kMaxGrid / groups) return PYFT_BAD_ARGUMENT;
  const dim3 block(static_cast<unsigned>(along), static_cast<unsigned>(kThreads / along));
  PYFT_LAUNCH(dequantize4<T>, static_cast<unsigned>(tiles * groups), block, stream, weight, slab,
              log2_of(weight.block_size), static_cast<unsigned>(tiles), static_cast<T*>(out));
  return pyft::launch_status();
}

}  // namespace

extern "C" {

pyft_status pyft_cuda_quantize4(const void* x, pyft_dtype dtype, int64_t n, int64_t block_size, const float* midpoints,
                                int zero_code, uint8_t* packed, float* absmax, void* stream) {
  if (n < 0 || !is_block_size(block_size) || zero_code < 0 || zero_code > 15) return PYFT_BAD_ARGUMENT;
  if (dtype != PYFT_F32 && dtype != PYFT_F16 && dtype != PYFT_BF16) return PYFT_BAD_ARGUMENT;
  if (n == 0) return PYFT_OK;
  const auto launch = dtype == PYFT_F32   ? launch_quantize4<float>
                      : dtype == PYFT_F16 ? launch_quantize4<__half>
                                          : launch_quantize4<__nv_bfloat16>;
  return launch(x, n, block_size, midpoints, zero_code, packed, absmax, static_cast<cudaStream_t>(stream));
}

pyft_status pyft_cuda_quantize_absmax(const float* x, int64_t n, const float* offset, const float* midpoints,
                                      int zero_code, uint8_t* codes, float* absmax, void* stream) {
  const int64_t grid = pyft::ceil_div(n, kNestedBlock);
  if (n < 0 || grid > pyft::kMaxGrid || zero_code < 0 || zero_code > 255) return PYFT_BAD_ARGUMENT;
  if (n == 0) return PYFT_OK;
  PYFT_LAUNCH(quantize_absmax, static_cast<unsigned>(grid), kNestedBlock, static_cast<cudaStream_t>(stream), x, n,
              offset, midpoints, zero_code, codes, absmax);
  return pyft::launch_status();
}

pyft_status pyft_cuda_dequantize4(const pyft_weight4* weight, int64_t row_begin, int64_t row_end, void* out,
                                  int64_t out_stride, pyft_dtype dtype, void* stream) {
  const int64_t rows = row_end - row_begin, cols = weight->cols;
  if (row_begin < 0 || rows < 0 || row_end > weight->rows || cols < 0 || !is_block_size(weight->block_size) ||
      (rows > 1 && out_stride < cols)) {
    return PYFT_BAD_ARGUMENT;
  }
  if (dtype != PYFT_F32 && dtype != PYFT_F16 && dtype != PYFT_BF16) return PYFT_BAD_ARGUMENT;
  if (rows == 0 || cols == 0) return PYFT_OK;
  const bool dense = rows == 1 || out_stride == cols;  // then the rows are one run
  const Slab slab = {row_begin * cols, dense ? 1 : rows, dense ? rows * cols : cols, out_stride};
  const auto launch = dtype == PYFT_F32   ? launch_dequantize4<float>
                      : dtype == PYFT_F16 ? launch_dequantize4<__half>
                                          : launch_dequantize4<__nv_bfloat16>;
  return launch(*weight, slab, out, static_cast<cudaStream_t>(stream));
}

}  // extern "C"
