// y = x Wᵀ + bias for few rows of x over a quantized weight, which is decoded in registers and rounded once to x's
// type; sums are fp32 in a fixed order, so that two runs give the same bits.
//
// A thread block gives a tile of kM rows by kN columns of y. Its threads go along K together, a piece each:
//
//        K ->  | thread 0 | thread 1 | ... | thread 127 | thread 0 | ...
//   kN rows    | codes    |          |     |            |
//   of W       | a row    |          |     |            |     each x and each code is one thread's: the values of a row
//   kM rows    | values   |          |     |            |     of x meet those of kN rows of W in registers, 8 at a time
//   of x       | a row    |          |     |            |
//
// A piece is 16 bytes of codes for up to kSmallM rows of x, so that their scale is decoded once; it is 8 elements for
// more rows, whose loads are coalesced then, and where rows of W do not begin at multiples of 16 bytes. Where not even
// 8 elements are aligned, bytes are put together, slowly. At the end the kM * kN sums of 128 threads are added by
// halves within a warp, then over the warps in shared memory. x is read N / kN times, but by neighbouring blocks at
// about the same time: the L1 cache stages it (8 KB a row at K = 4096 and 16 bits). The m tiles of one n tile are
// neighbours too, so that W comes from memory once.
//
// Bytes per weight with 4 bits: 0.5 and its share of a scale, against 2.5 and more of decoding it to memory first.
// Instructions per weight: 6 to decode, 1.5 to round to bf16, kM multiply-adds, kM / kN loads and widenings of x, and
// 50 for the scale and the addresses of a piece. With one row of x that is 10, where an H100 at 3 TB/s has time for 5.
#include "weight.h"

namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kChunk = 8;  // elements of K whose products a thread adds at once
constexpr int kN = 4;      // columns of y a thread block gives
constexpr int kSmallM = 4, kMaxM = 64;

// Elements in 16 bytes of codes.
template <int kBits>
constexpr int kPiece = 128 / kBits;

// How a thread reads: 16 bytes of codes, or the codes of kChunk elements, and 16 bytes of x; or a byte and an x at a
// time.
enum class Access { kPieces, kChunks, kAny };

// Thread blocks a multiprocessor has registers for.
constexpr int blocks_at_once(int m, Access access) { return m == 1 ? 5 : access == Access::kPieces ? 4 : 3; }

// What is the same for all of a launch.
struct Shape {
  int64_t m, x_stride, y_stride;
  int block_shift;  // log2(block_size); -1: blocks are rows
};

// 16 bytes of codes of row n of W from column k on.
template <int kBits>
struct Piece {
  uint32_t word[4];
  float scale, zero;

  __device__ void load(const pyft_weight& weight, const Shape& shape, int64_t n, int64_t k) {
    const int64_t element = n * weight.cols + k;
    const uint4 wide = pyft::load_wide<uint4>(weight.packed + (element >> (kBits == 4 ? 1 : 0)));
    memcpy(word, &wide, sizeof wide);
    const int64_t block = shape.block_shift < 0 ? n : element >> shape.block_shift;
    scale = pyft::scale_of(weight, block);
    zero = pyft::zero_of(weight, block);
  }

  // Chunk i, rounded to T.
  template <class T>
  __device__ void decode(const float* table, int i, float (&out)[kChunk]) const {
#pragma unroll
    for (int c = 0; c < kChunk; ++c) {
      out[c] = pyft::decode(table[pyft::code_at<kBits>(word, i * kChunk + c)], zero, scale);
    }
#pragma unroll
    for (int c = 0; c < kChunk; c += 2) pyft::round_pair<T>(out[c], out[c + 1]);
  }
};

// The codes of elements [element, element + count), at most kChunk, at any place, as if a byte began with them.
template <int kBits>
__device__ void load_codes(const uint8_t* packed, int64_t element, int count, uint32_t (&word)[2]) {
  const bool low = kBits == 4 && element % 2;  // the first code is a low nibble
  const uint8_t* from = packed + element * kBits / 8;
  const int bytes = ((low ? count + 1 : count) * kBits + 7) / 8;
  uint32_t before = 0;
  word[0] = word[1] = 0;
#pragma unroll
  for (int i = 0; i <= kChunk * kBits / 8; ++i) {
    const uint32_t byte = i < bytes ? from[i] : 0;
    if (low && i > 0) word[(i - 1) / 4] |= ((before & 15) << 4 | byte >> 4) << ((i - 1) % 4 * 8);
    if (!low && i < kChunk * kBits / 8) word[i / 4] |= byte << (i % 4 * 8);
    before = byte;
  }
}

// kChunk elements of row n of W from column k on, rounded to T; zeros where there are none.
template <class T, int kBits, Access kAccess>
__device__ void load_weights(const pyft_weight& weight, const Shape& shape, const float* table, int64_t n, int64_t k,
                             float (&out)[kChunk]) {
  const int64_t element = n * weight.cols + k;
  const int64_t block = shape.block_shift < 0 ? n : element >> shape.block_shift;
  const float scale = pyft::scale_of(weight, block), zero = pyft::zero_of(weight, block);
  uint32_t word[2];
  if constexpr (kAccess == Access::kChunks) {
    if constexpr (kBits == 8) {
      const uint2 wide = pyft::load_wide<uint2>(weight.packed + element);
      word[0] = wide.x;
      word[1] = wide.y;
    } else {
      word[0] = pyft::load_wide<uint32_t>(weight.packed + element / 2);
    }
#pragma unroll
    for (int i = 0; i < kChunk; ++i) out[i] = pyft::decode(table[pyft::code_at<kBits>(word, i)], zero, scale);
  } else {
    const int count = weight.cols - k < kChunk ? static_cast<int>(weight.cols - k) : kChunk;
    load_codes<kBits>(weight.packed, element, count, word);
    int same = count;  // elements in this block; the others are in the next one
    float next_scale = scale, next_zero = zero;
    if (shape.block_shift >= 0) {
      const int64_t left = ((block + 1) << shape.block_shift) - element;
      if (left < count) {
        same = static_cast<int>(left);
        next_scale = pyft::scale_of(weight, block + 1);
        next_zero = pyft::zero_of(weight, block + 1);
      }
    }
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const float code = table[pyft::code_at<kBits>(word, i)];
      out[i] = pyft::decode(code, i < same ? zero : next_zero, i < same ? scale : next_scale);
      if (i >= count) out[i] = 0.0f;
    }
  }
#pragma unroll
  for (int i = 0; i < kChunk; i += 2) pyft::round_pair<T>(out[i], out[i + 1]);
}

// The first `count` of kChunk elements of x; zeros where there are no more.
template <class T, Access kAccess>
__device__ void load_x(const T* x, int64_t count, float (&out)[kChunk]) {
  T raw[kChunk];
  if constexpr (kAccess == Access::kAny) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      out[i] = 0.0f;
      if (i < count) out[i] = pyft::widen(x[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; i += pyft::kWide<T>) {
      const uint4 part = pyft::load_wide<uint4>(x + i);
      memcpy(raw + i, &part, sizeof part);
    }
#pragma unroll
    for (int i = 0; i < kChunk; ++i) out[i] = pyft::widen(raw[i]);
  }
}

// The sum over the 32 lanes of each of kCount values. In each step a lane keeps one half of them and gives the other
// away; it ends with value first + i in value[i], and returns first.
template <int kCount, int kLanes = 16>
__device__ int sum_by_halves(float* value) {
  const int lane = threadIdx.x % 32;
  const bool upper = lane & kLanes;
  constexpr int kKept = kCount > 1 ? kCount / 2 : 1;
  int first = 0;
  if constexpr (kCount > 1) {
    first = upper ? kKept : 0;
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const float given = upper ? value[i] : value[i + kKept];
      const float kept = upper ? value[i + kKept] : value[i];
      value[i] = __fadd_rn(kept, __shfl_xor_sync(0xffffffffu, given, kLanes));
    }
  } else {
    value[0] = __fadd_rn(value[0], __shfl_xor_sync(0xffffffffu, value[0], kLanes));
  }
  if constexpr (kLanes > 1) first += sum_by_halves<kKept, kLanes / 2>(value);
  return first;
}

template <class T, int kBits, int kM, Access kAccess>
__global__ void __launch_bounds__(kThreads, blocks_at_once(kM, kAccess))
    qlinear(const T* x, pyft_weight weight, Shape shape, unsigned m_tiles, const T* bias, T* y) {
  constexpr int kCount = kM * kN, kKept = kCount > 32 ? kCount / 32 : 1;
  constexpr int kChunks = kAccess == Access::kPieces ? kPiece<kBits> / kChunk : 1;
  PYFT_SHARED(float, table, 1 << kBits);
  PYFT_SHARED(float, partial, kWarps* kCount);
  for (int i = threadIdx.x; i < 1 << kBits; i += kThreads) table[i] = weight.codes[i];
  __syncthreads();

  const int64_t n = int64_t{blockIdx.x / m_tiles} * kN, m = int64_t{blockIdx.x % m_tiles} * kM;
  const int columns = weight.rows - n < kN ? static_cast<int>(weight.rows - n) : kN;
  const int rows = shape.m - m < kM ? static_cast<int>(shape.m - m) : kM;
  float sum[kCount] = {};  // of row i and column j at i * kN + j
  for (int64_t k = int64_t{threadIdx.x} * (kChunks * kChunk); k < weight.cols; k += kThreads * kChunks * kChunk) {
    Piece<kBits> piece[kN];
    if constexpr (kAccess == Access::kPieces) {
#pragma unroll
      for (int j = 0; j < kN; ++j) piece[j].load(weight, shape, n + (j < columns ? j : 0), k);
    }
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      float w[kN][kChunk];
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        if constexpr (kAccess == Access::kPieces) {
          piece[j].template decode<T>(table, chunk, w[j]);
        } else {
          load_weights<T, kBits, kAccess>(weight, shape, table, n + (j < columns ? j : 0), k, w[j]);
        }
      }
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        if (i >= rows) break;
        float value[kChunk];
        const int64_t at = k + chunk * kChunk;
        load_x<T, kAccess>(x + (m + i) * shape.x_stride + at, weight.cols - at, value);
#pragma unroll
        for (int j = 0; j < kN; ++j) {
#pragma unroll
          for (int c = 0; c < kChunk; ++c) sum[i * kN + j] = __fmaf_rn(value[c], w[j][c], sum[i * kN + j]);
        }
      }
    }
  }

  const int first = sum_by_halves<kCount>(sum);
#pragma unroll
  for (int i = 0; i < kKept; ++i) partial[threadIdx.x / 32 * kCount + first + i] = sum[i];
  __syncthreads();
  const int i = threadIdx.x / kN, j = threadIdx.x % kN;
  if (i >= rows || j >= columns) return;
  float total = partial[threadIdx.x];
  for (int warp = 1; warp < kWarps; ++warp) total = __fadd_rn(total, partial[warp * kCount + threadIdx.x]);
  if (bias != nullptr) total = __fadd_rn(total, pyft::widen(bias[n + j]));
  pyft::narrow(total, y[(m + i) * shape.y_stride + n + j]);
}

// ---- launcher -------------------------------------------------------------------------------------------------------

template <class T, int kBits, int kM, Access kAccess>
pyft_status launch(const T* x, const pyft_weight& weight, const Shape& shape, const T* bias, T* y,
                   cudaStream_t stream) {
  const int64_t m_tiles = pyft::ceil_div(shape.m, kM), n_tiles = pyft::ceil_div(weight.rows, kN);
  if (n_tiles > pyft::kMaxGrid / m_tiles) return PYFT_BAD_ARGUMENT;
  const auto kernel = qlinear<T, kBits, kM, kAccess>;
  PYFT_LAUNCH(kernel, static_cast<unsigned>(n_tiles * m_tiles), kThreads, stream, x, weight, shape,
              static_cast<unsigned>(m_tiles), bias, y);
  return pyft::launch_status();
}

// The launcher for this x and weight.
template <class T, int kBits>
auto choose(const void* x, int64_t m, int64_t x_stride, const pyft_weight& weight) {
  const bool x_wide = pyft::is_aligned(x, 16) && x_stride % pyft::kWide<T> == 0;
  const bool pieces = weight.cols % kPiece<kBits> == 0 && pyft::is_aligned(weight.packed, 16);
  const bool chunks = weight.cols % kChunk == 0 && pyft::is_aligned(weight.packed, kChunk * kBits / 8);
  if (!x_wide || !chunks) return launch<T, kBits, kSmallM, Access::kAny>;
  if (!pieces || m > kSmallM) return launch<T, kBits, 16, Access::kChunks>;
  return m == 1 ? launch<T, kBits, 1, Access::kPieces> : launch<T, kBits, kSmallM, Access::kPieces>;
}

}  // namespace

extern "C" pyft_status pyft_cuda_qlinear(const void* x, int64_t m, int64_t x_stride, const pyft_weight* weight,
                                         const void* bias, void* y, int64_t y_stride, pyft_dtype dtype, void* stream) {
  if (!pyft::is_weight(*weight) || m < 0 || m > kMaxM || (m > 1 && y_stride < weight->rows)) return PYFT_BAD_ARGUMENT;
  if (m == 0 || weight->rows == 0) return pyft::is_dtype(dtype) ? PYFT_OK : PYFT_BAD_ARGUMENT;
  const bool flat = pyft::is_flat_block(weight->block_size);
  const Shape shape = {m, x_stride, y_stride, flat ? pyft::log2_of(weight->block_size) : -1};
  return pyft::with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const auto run = weight->bits == 4 ? choose<T, 4>(x, m, x_stride, *weight) : choose<T, 8>(x, m, x_stride, *weight);
    return run(static_cast<const T*>(x), *weight, shape, static_cast<const T*>(bias), static_cast<T*>(y),
               static_cast<cudaStream_t>(stream));
  });
}
