// Tiles of attention's matrices in shared memory and in registers, and their products; attention.h says whose they are.
//
// A tile's rows of 16-byte chunks lie in shared memory with chunk c of row r at c ^ (r % 8): the eight rows that
// ldmatrix reads at once, at the same c, are in different banks, and so are the eight chunks that neighbours store.
#pragma once

#include "mma.h"

namespace pyft {

constexpr int kOwnRows = 64;

// What is fixed by the largest head dim and by the columns of a tile.
template <int kHeadDim, int kColumns>
struct Shape {
  static constexpr int kDim = kHeadDim, kCols = kColumns;
  static constexpr int kSplit = kDim > 128 ? 2 : 1;  // warps that share rows
  static constexpr int kPart = kDim / kSplit;
  static constexpr int kWarps = kOwnRows / 16 * kSplit;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kChunks = kDim / 8;  // of 16 bytes, a row
  static constexpr int kTile = kCols * kChunks;
  static constexpr int kMemory = 4 * kTile;  // two tiles each of two kinds of columns; the own rows of one kind
  static_assert(kMemory >= kOwnRows * kChunks, "own rows and results pass through here");
  static constexpr int kOwn = kOwnRows * kChunks;
  static constexpr int kHalves = kSplit == 2 ? kWarps * (kCols / 8) * 32 : 0;  // c of every warp
};

struct alignas(128) Line {
  uint4 chunk[8];
};

// A tensor [batch, heads, seq, dim].
template <class T>
struct View {
  T* data;
  int64_t batch_stride, head_stride, seq_stride;
  int dim;
  bool wide;  // 16 bytes can be read and written at a time
};

// Rows [0, count) of a sequence of a head.
template <class T>
struct Rows {
  T* first;
  int64_t stride;
  int count, dim;
  bool wide;
};

template <class T>
__device__ Rows<T> rows_of(const View<T>& view, int64_t batch, int64_t head, int row, int count) {
  T* first = view.data + batch * view.batch_stride + head * view.head_stride + row * view.seq_stride;
  hide_origin(first);
  return {first, view.seq_stride, count, view.dim, view.wide};
}

// ---- tiles ----------------------------------------------------------------------------------------------------------

template <int kDim>
__device__ int chunk_at(int row, int chunk) {
  return row * (kDim / 8) + (chunk ^ row % 8);
}

// 16 bytes of a row from `column` on; zeros where there is nothing. Wide rows only.
template <class T>
__device__ uint4 read_wide(const Rows<T>& rows, int row, int column) {
  if (row >= rows.count || column >= rows.dim) return {0, 0, 0, 0};
  return read_only(reinterpret_cast<const uint4*>(rows.first + row * rows.stride + column));
}

template <class T>
__device__ uint4 read_any(const Rows<T>& rows, int row, int column) {
  if (rows.wide || row >= rows.count || column >= rows.dim) return read_wide(rows, row, column);
  const T* from = rows.first + row * rows.stride + column;
  std::remove_const_t<T> element[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    narrow(0.0f, element[i]);
    if (column + i < rows.dim) element[i] = read_only(from + i);
  }
  uint4 chunk;
  memcpy(&chunk, element, sizeof chunk);
  return chunk;
}

// kCount rows from `first` on -> shared memory.
template <class T, int kDim, int kCount, int kThreads>
__device__ void copy_rows(const Rows<T>& rows, int first, uint4* tile) {
  constexpr int kChunks = kDim / 8;
#pragma unroll 1
  for (int i = threadIdx.x; i < kCount * kChunks; i += kThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    tile[chunk_at<kDim>(row, chunk)] = read_any(rows, first + row, chunk * 8);
  }
}

// kOwnRows rows in shared memory -> those that there are from `first` on.
template <class T, int kDim, int kThreads>
__device__ void write_rows(const uint4* tile, int first, const Rows<T>& rows) {
  constexpr int kChunks = kDim / 8;
#pragma unroll 1
  for (int i = threadIdx.x; i < kOwnRows * kChunks; i += kThreads) {
    const int row = i / kChunks, column = i % kChunks * 8;
    if (first + row >= rows.count || column >= rows.dim) continue;
    const uint4 chunk = tile[chunk_at<kDim>(row, column / 8)];
    T* to = rows.first + (first + row) * rows.stride + column;
    if (rows.wide) {
      store_wide(to, chunk);
    } else {
      T element[8];
      memcpy(element, &chunk, sizeof chunk);
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        if (column + c < rows.dim) store_wide(to + c, element[c]);
      }
    }
  }
}

// A tile of both kinds of columns on its way to shared memory. Those that cannot be read 16 bytes at a time go there at
// once, when they are stored. Not to outlive a turn of a loop: its registers are free in between.
template <class T, class S>
struct Stage {
  static constexpr int kStep = S::kThreads / S::kChunks;  // rows the threads read at once; a multiple of 8
  static_assert(kStep % 8 == 0 && S::kCols % kStep == 0, "a thread's chunks have one place in their rows");
  uint4 part[2][S::kCols / kStep] = {};

  __device__ void load(const Rows<T> (&columns)[2], int first) {
    const int row = first + static_cast<int>(threadIdx.x) / S::kChunks, column = threadIdx.x % S::kChunks * 8;
#pragma unroll
    for (int kind = 0; kind < 2; ++kind) {
      if (!columns[kind].wide) continue;
#pragma unroll
      for (int i = 0; i < S::kCols / kStep; ++i) part[kind][i] = read_wide(columns[kind], row + i * kStep, column);
    }
  }

  __device__ void store(const Rows<T> (&columns)[2], int first, uint4* tiles) const {
    const int at = chunk_at<S::kDim>(threadIdx.x / S::kChunks, threadIdx.x % S::kChunks);
#pragma unroll
    for (int kind = 0; kind < 2; ++kind) {
      uint4* tile = tiles + kind * S::kTile;
      if (!columns[kind].wide) {
        copy_rows<T, S::kDim, S::kCols, S::kThreads>(columns[kind], first, tile);
        continue;
      }
#pragma unroll
      for (int i = 0; i < S::kCols / kStep; ++i) tile[at + i * kStep * S::kChunks] = part[kind][i];
    }
  }
};

// ---- products -------------------------------------------------------------------------------------------------------

// Who a lane is: the own rows of its warp, and its places in c.
template <class S>
struct Lane {
  int warp, row, half, g, t;  // row: of the 16 of its warp the first; half: of the head, its warp's

  __device__ Lane() {
    const int lane = threadIdx.x % 32;
    warp = threadIdx.x / 32;
    row = warp / S::kSplit * 16;
    half = warp % S::kSplit;
    g = lane / 4;
    t = lane % 4;
  }

  // What this lane tells ldmatrix of the matrix at the origin of a tile: matrices in the order of a, which is also that
  // of two transposed b side by side; or two b above each other, of two times 8 columns.
  __device__ uint32_t as_a() const { return offset(threadIdx.x % 16, threadIdx.x / 16 % 2); }
  __device__ uint32_t as_b() const { return offset(threadIdx.x % 8 + threadIdx.x / 16 % 2 * 8, threadIdx.x / 8 % 2); }

 private:
  __device__ uint32_t offset(int row_of_16, int chunk) const {
    return chunk_at<S::kDim>(row_of_16, chunk) * 16 + half * S::kPart * 2;
  }
};

// The 16 x 16 elements i below and j beside those at `origin`.
template <int kDim>
__device__ SharedAddress block_at(SharedAddress origin, int i, int j) {
  return (origin ^ static_cast<SharedAddress>(j % 4 * 32)) + j / 4 * 128 + i * 32 * kDim;
}

// Own rows, as fragments of a.
template <int kPart>
using Fragments = uint32_t[kPart / 16][4];

// Reads its own rows through shared memory, which is free before and after.
template <class T, class S>
__device__ void read_own(const Rows<T>& rows, int first, const Lane<S>& lane, uint4* memory, Fragments<S::kPart>& own) {
  copy_rows<T, S::kDim, kOwnRows, S::kThreads>(rows, first, memory);
  __syncthreads();
  const SharedAddress origin = shared_address(memory) + lane.as_a() + lane.row * S::kDim * 2;
#pragma unroll
  for (int k = 0; k < S::kPart / 16; ++k) load_matrices<false>(block_at<S::kDim>(origin, 0, k), own[k]);
  __syncthreads();
}

// s += own · columnsᵀ, with own rows in registers, or from shared memory at as_a; `origin` is that of as_b in the tile.
template <class T, class S, class Own>
__device__ void multiply_columns(const Own& own, SharedAddress origin, float (&s)[S::kCols / 8][4]) {
#pragma unroll
  for (int k = 0; k < S::kPart / 16; ++k) {
    uint32_t a[4];
    if constexpr (std::is_same<Own, SharedAddress>::value) {
      load_matrices<false>(block_at<S::kDim>(own, 0, k), a);
    } else {
      memcpy(a, own[k], sizeof a);
    }
#pragma unroll
    for (int n = 0; n < S::kCols / 16; ++n) {
      uint32_t b[4];
      load_matrices<false>(block_at<S::kDim>(origin, n, k), b);
      multiply<T>(a, b[0], b[1], s[2 * n]);
      multiply<T>(a, b[2], b[3], s[2 * n + 1]);
    }
  }
}

// sum += weights · columns; `origin` is that of as_a in the tile.
template <class T, class S>
__device__ void add_columns(const Fragments<S::kCols>& weights, SharedAddress origin, float (&sum)[S::kPart / 8][4]) {
#pragma unroll
  for (int k = 0; k < S::kCols / 16; ++k) {
#pragma unroll
    for (int n = 0; n < S::kPart / 16; ++n) {
      uint32_t b[4];
      load_matrices<true>(block_at<S::kDim>(origin, k, n), b);
      multiply<T>(weights[k], b[0], b[1], sum[2 * n]);
      multiply<T>(weights[k], b[2], b[3], sum[2 * n + 1]);
    }
  }
}

// c rounded, as an a.
template <class T, int kCount>
__device__ void round_to(const float (&c)[kCount][4], uint32_t (&a)[kCount / 2][4]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    a[i / 2][i % 2 * 2] = narrow_pair<T>(c[i][0], c[i][1]);
    a[i / 2][i % 2 * 2 + 1] = narrow_pair<T>(c[i][2], c[i][3]);
  }
}

// Halves of kCount sums: those of this warp go to `memory`, those of the warp with its rows are added, once that is
// there; the order of the two does not show in the sum.
template <int kCount>
__device__ void give_half(const float (&sum)[kCount][4], int warp, float4* memory) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    memory[(warp * kCount + i) * 32 + threadIdx.x % 32] = {sum[i][0], sum[i][1], sum[i][2], sum[i][3]};
  }
}

template <int kCount>
__device__ void take_half(float (&sum)[kCount][4], int warp, const float4* memory) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float4 other = memory[((warp ^ 1) * kCount + i) * 32 + threadIdx.x % 32];
    sum[i][0] += other.x;
    sum[i][1] += other.y;
    sum[i][2] += other.z;
    sum[i][3] += other.w;
  }
}

// Writes sums times factor[0] (rows g) and factor[1] (rows g + 8), through shared memory, which is free before.
template <class T, class S>
__device__ void write_own(const float (&sum)[S::kPart / 8][4], const float (&factor)[2], const Lane<S>& lane,
                          uint4* memory, int first, const Rows<T>& rows) {
  uint32_t* words = reinterpret_cast<uint32_t*>(memory);
#pragma unroll
  for (int n = 0; n < S::kPart / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int chunk = chunk_at<S::kDim>(lane.row + lane.g + 8 * i, lane.half * (S::kPart / 8) + n);
      words[chunk * 4 + lane.t] = narrow_pair<T>(sum[n][2 * i] * factor[i], sum[n][2 * i + 1] * factor[i]);
    }
  }
  __syncthreads();
  write_rows<T, S::kDim, S::kThreads>(memory, first, rows);
}

template <class T>
View<T> view_of(const pyft_head_view& view, int64_t batch, int64_t heads, int64_t seq, int64_t dim) {
  const bool wide = is_aligned(view.data, 16) && dim % 8 == 0 && (batch <= 1 || view.batch_stride % 8 == 0) &&
                    (heads <= 1 || view.head_stride % 8 == 0) && (seq <= 1 || view.seq_stride % 8 == 0);
  return {
      static_cast<T*>(view.data), view.batch_stride, view.head_stride, view.seq_stride, static_cast<int>(dim), wide};
}

}  // namespace pyft
