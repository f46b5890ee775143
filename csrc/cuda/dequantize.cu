// Decoding a rectangle of a quantized weight: the layout and the rules of pyft/formats.py, bit for bit.
//
// A warp works on one tile: 512 bytes of codes (1024 elements of 4 bits, 512 of 8) that begin at a multiple of that in
// the weight, wherever the rows of the rectangle begin. Each lane loads 16 bytes of codes and the scale of one block.
// Codes are exchanged through shared memory, scales by shuffles, so that in each step neighbouring lanes hold
// neighbouring chunks, and a chunk is what 16 bytes of the output hold:
//
//   loaded     | lane 0: 16 bytes | lane 1: 16 bytes | ... | lane 31 |
//   step 0     |c0|c1|c2| ... |c31|                                       lane l writes chunk l,
//   step 1                        |c0|c1|c2| ... |c31|                    then chunk 32 + l, ...
//
// Bytes moved per element into 16-bit weights: 4 bits 0.5 + 2, 8 bits 1 + 2, and the scale: 4 / block_size, nested
// 1 / block_size + 4 / (256 block_size). At block size 64 and nested, 2.516. Instructions per element, 4 bits to bf16:
// shift, mask, load from shared memory, subtract, multiply, half a conversion, an eighth of a store: 6.5 with the
// checks of a chunk; and 190 for a lane's 32 elements to find them and their scale: 12.5 together, where an H100 (132
// multiprocessors, 1.7 GHz, 3 TB/s) has time for 24. Its 64 resident warps a multiprocessor have 32 KB of codes in
// flight. The 16 codes of 4 bits lie in 16 banks: their loads never conflict. The 256 of 8 bits lie 8 to a bank: some 3
// passes a load, where there is time for 7.
#include "weight.h"

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kLaneBytes = 16;
constexpr int kTileBytes = 32 * kLaneBytes;

// `count` runs of `length` elements: run r begins at element first + r * pitch of the weight and at out + r * stride.
// In weights of row blocks a run lies in block row + r; in others row is -1 and a block is 2^block_shift elements.
struct Runs {
  int64_t first, pitch, length, stride, row;
  int64_t packed_bytes;  // of the whole weight
  unsigned count;
  unsigned tiles;  // that a run touches at most
  int block_shift;
  bool aligned;  // the weight begins at a multiple of 16 bytes
};

// The first `left` of the 16 bytes at `from`, or all.
__device__ uint4 load_lane(const uint8_t* from, int64_t left, bool aligned) {
  if (left >= kLaneBytes && aligned) return pyft::load_wide<uint4>(from);
  const int bytes = left < kLaneBytes ? static_cast<int>(left) : kLaneBytes;
  uint32_t word[4] = {};
#pragma unroll
  for (int i = 0; i < kLaneBytes; ++i) {
    if (i < bytes) word[i / 4] |= uint32_t{from[i]} << (i % 4 * 8);
  }
  return {word[0], word[1], word[2], word[3]};
}

// The codes of one chunk, kBytes of them at `stage`, as words.
template <int kBytes>
__device__ void read_chunk(const uint8_t* stage, uint32_t (&word)[2]) {
  if constexpr (kBytes == 8) {
    const uint2 wide = pyft::load_wide<uint2>(stage);
    word[0] = wide.x;
    word[1] = wide.y;
  } else if constexpr (kBytes == 4) {
    word[0] = pyft::load_wide<uint32_t>(stage);
  } else {
    word[0] = pyft::load_wide<uint16_t>(stage);
  }
}

// Warp w works on tile w % tiles of run w / tiles.
template <class T, int kBits>
__global__ void __launch_bounds__(kThreads) dequantize(pyft_weight weight, Runs runs, T* out) {
  constexpr int kTile = kTileBytes * 8 / kBits, kLane = kTile / 32;
  constexpr int kChunk = pyft::kWide<T>, kChunkBytes = kChunk * kBits / 8, kSteps = kTile / (32 * kChunk);
  PYFT_SHARED(float, table, 1 << kBits);
  PYFT_SHARED(uint4, stage, kThreads);
  const int lane = threadIdx.x % 32;
  const unsigned warp = blockIdx.x * kWarps + threadIdx.x / 32;
  const unsigned run = warp / runs.tiles, nth = warp % runs.tiles;
  const int64_t begin = runs.first + run * runs.pitch;  // of the run, in elements of the weight
  const int before = static_cast<int>(begin % kTile);   // elements of the run's first tile before it
  const int64_t tile = begin - before + int64_t{nth} * kTile, left = runs.length + before - int64_t{nth} * kTile;
  const int from = nth == 0 ? before : 0, to = left < kTile ? static_cast<int>(left) : kTile;  // of the run in the tile
  const bool active = run < runs.count && left > 0;

  float scale = 0.0f, zero = 0.0f;
  uint4 loaded = {};
  if (active) {
    if (lane * kLane < to && (lane + 1) * kLane > from) {
      const int64_t byte = (tile >> (kBits == 4 ? 1 : 0)) + lane * kLaneBytes;
      loaded = load_lane(weight.packed + byte, runs.packed_bytes - byte, runs.aligned);
    }
    const int last = (to - 1) >> runs.block_shift;
    const int64_t block = runs.row >= 0 ? runs.row + run : (tile >> runs.block_shift) + (lane < last ? lane : last);
    scale = pyft::scale_of(weight, block);
    zero = pyft::zero_of(weight, block);
  }
  if (threadIdx.x < 1 << kBits) table[threadIdx.x] = weight.codes[threadIdx.x];
  stage[threadIdx.x] = loaded;
  __syncthreads();
  if (!active) return;

  const uint8_t* codes = reinterpret_cast<const uint8_t*>(stage + (threadIdx.x - lane));
  T* const target = out + run * runs.stride + (tile - begin);
  const bool wide = pyft::is_aligned(target, 16);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int at = (step * 32 + lane) * kChunk, source = at >> runs.block_shift;
    const float s = __shfl_sync(0xffffffffu, scale, source);
    const float z = weight.zeros == nullptr ? 0.0f : __shfl_sync(0xffffffffu, zero, source);
    uint32_t word[2];
    read_chunk<kChunkBytes>(codes + at * kBits / 8, word);
    float value[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) value[i] = pyft::decode(table[pyft::code_at<kBits>(word, i)], z, s);
    if (wide && at >= from && at + kChunk <= to) {
      pyft::store_wide<uint4>(target + at, pyft::narrow_wide<T>(value));
    } else {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        if (at + i >= from && at + i < to) pyft::narrow(value[i], target[at + i]);
      }
    }
  }
}

// ---- launcher -------------------------------------------------------------------------------------------------------

template <class T, int kBits>
pyft_status launch(const pyft_weight& weight, Runs runs, int64_t count, T* out, cudaStream_t stream) {
  constexpr int64_t kTile = kTileBytes * 8 / kBits;
  const bool starts_at_tiles = runs.first % kTile == 0 && (count == 1 || runs.pitch % kTile == 0);
  const int64_t tiles = pyft::ceil_div(runs.length, kTile) + (starts_at_tiles ? 0 : 1);
  if (tiles > pyft::kMaxGrid / count) return PYFT_BAD_ARGUMENT;
  runs.count = static_cast<unsigned>(count);
  runs.tiles = static_cast<unsigned>(tiles);
  const auto grid = static_cast<unsigned>(pyft::ceil_div(tiles * count, kWarps));
  const auto kernel = dequantize<T, kBits>;
  PYFT_LAUNCH(kernel, grid, kThreads, stream, weight, runs, out);
  return pyft::launch_status();
}

}  // namespace

extern "C" pyft_status pyft_cuda_dequantize(const pyft_weight* weight, const pyft_slab* slab, void* out,
                                            int64_t out_stride, pyft_dtype dtype, void* stream) {
  const int64_t rows = slab->row_end - slab->row_begin, cols = slab->col_end - slab->col_begin;
  if (!pyft::is_weight(*weight) || slab->row_begin < 0 || rows < 0 || slab->row_end > weight->rows ||
      slab->col_begin < 0 || cols < 0 || slab->col_end > weight->cols || (rows > 1 && out_stride < cols)) {
    return PYFT_BAD_ARGUMENT;
  }
  if (rows == 0 || cols == 0) return pyft::is_dtype(dtype) ? PYFT_OK : PYFT_BAD_ARGUMENT;
  int64_t count = rows;
  Runs runs = {};
  runs.first = slab->row_begin * weight->cols + slab->col_begin;
  runs.pitch = weight->cols;
  runs.length = cols;
  runs.stride = out_stride;
  runs.packed_bytes = pyft::ceil_div(weight->rows * weight->cols * weight->bits, 8);
  runs.aligned = pyft::is_aligned(weight->packed, kLaneBytes);
  if (pyft::is_flat_block(weight->block_size)) {
    runs.row = -1;
    runs.block_shift = pyft::log2_of(weight->block_size);
    if (cols == weight->cols && (rows == 1 || out_stride == cols)) {  // the rows are one run
      count = 1;
      runs.length = rows * cols;
    }
  } else {
    runs.row = slab->row_begin;
    runs.block_shift = 31;
  }
  return pyft::with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const auto kernel = weight->bits == 4 ? launch<T, 4> : launch<T, 8>;
    return kernel(*weight, runs, count, static_cast<T*>(out), static_cast<cudaStream_t>(stream));
  });
}
