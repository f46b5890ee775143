// What the forward and the backward pass of attention share: how work is divided, and which pairs of a query and a key
// count. The equations are those of pyft/reference/attention.py.
//
// A thread block has 64 rows of its own (queries, or keys where it gives dk and dv) of a head, and goes along the rows
// of the other kind, its columns, kCols at a time:
//
//                        columns ->
//                    | kCols | kCols | ...
//   own   warp 0  16 |  s    |       |          s = own · columnᵀ in registers, as c of mma.h. Rounded it is the a of
//   rows  warp 1  16 |       |       |          the next product, += s · columns: nothing of size rows x columns goes
//         warp 2  16 |       |       |          through memory, and a row's sums stay within four lanes.
//         warp 3  16 |       |       |
//
// Own rows are fragments in registers, but for v where there is no room. Columns go from memory to registers while the
// tile before them is worked on, then to shared memory, which has room for two tiles: one barrier a tile. Tiles that
// nobody sees are not gone through; a tile that all rows see whole skips the comparisons.
//
// Heads of up to 128 are one warp's; of a larger one two warps share 16 rows, each with 128 of its columns. They add up
// their halves of s through shared memory, and each goes on with its half of the result: the registers of a warp are
// what they are for 128.
//
//   head up to                          64       128       256
//   threads                            128       128       256
//   registers: a matrix of own rows     16        32        32
//              a result                 32        64        64
#pragma once

#include "attention_tiles.h"

namespace pyft {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_inff();
constexpr int kMaxRows = 1 << 29, kFar = 1 << 30;  // of a sequence; beyond what anyone can see
constexpr unsigned kWholeWarp = 0xffffffffu;

// What all kernels are told.
struct Call {
  int heads, group, tiles;  // heads of keys, query heads a head of keys, thread blocks a head
  int q_len, k_len;
  const int32_t* cu_q;
  const int32_t* cu_k;
  int sequences;
  int64_t low, high;   // query i sees keys i + nk - nq + low .. i + nk - nq + high
  float scale;         // of q·k
  float exponent;      // times log2(e): exponentials are of base 2
  float cap, inverse;  // softcap log2(e) and its inverse, or 0
};

// The rows a thread block has of its own and the columns it goes along, of one sequence.
struct Place {
  int row, column;    // where the sequence begins
  int rows, columns;  // how long it is
  int first;          // the block has rows [first, first + kOwnRows) of it
  int low, high;      // row r counts with columns r + low .. r + high

  __device__ int last() const { return (first + kOwnRows < rows ? first + kOwnRows : rows) - 1; }
  // The tiles of columns that count: [begin, end), begin a multiple of kCols.
  template <int kCols>
  __device__ int begin() const {
    return (first + low > 0 ? first + low : 0) / kCols * kCols;
  }
  // Whether row r counts with any column.
  __device__ bool counts(int r) const {
    const int from = r + low > 0 ? r + low : 0, to = r + high < columns - 1 ? r + high : columns - 1;
    return from <= to;
  }
  __device__ int end() const { return last() + high < columns - 1 ? last() + high + 1 : columns; }
};

__device__ inline int within_far(int64_t x) { return static_cast<int>(x < -kFar ? -kFar : x > kFar ? kFar : x); }

// Tile t of kOwnRows rows is of the sequence s with cu[s] / kOwnRows + s <= t < cu[s + 1] / kOwnRows + s + 1; these
// are enough tiles for each sequence, and may be one too many: then first >= rows.
template <bool kOfKeys>
__device__ Place place_of(const Call& call, int tile) {
  Place place = {0, 0, 0, 0, tile * kOwnRows, 0, 0};
  place.rows = kOfKeys ? call.k_len : call.q_len;
  place.columns = kOfKeys ? call.q_len : call.k_len;
  if (call.cu_q != nullptr) {
    const int32_t *cu = kOfKeys ? call.cu_k : call.cu_q, *cu_columns = kOfKeys ? call.cu_q : call.cu_k;
    int s = 0, end = call.sequences;
    while (end - s > 1) {
      const int middle = (s + end) / 2;
      (cu[middle] / kOwnRows + middle <= tile ? s : end) = middle;
    }
    place.row = cu[s];
    place.column = cu_columns[s];
    place.first = (tile - s - cu[s] / kOwnRows) * kOwnRows;
    place.rows = cu[s + 1] - place.row;
    place.columns = cu_columns[s + 1] - place.column;
  }
  const int ahead = kOfKeys ? place.rows - place.columns : place.columns - place.rows;
  place.low = kOfKeys ? -within_far(ahead + call.high) : within_far(ahead + call.low);
  place.high = kOfKeys ? -within_far(ahead + call.low) : within_far(ahead + call.high);
  return place;
}

// What a thread block works on: a head, of queries too, or the first of those that share keys; and rows.
struct Work {
  int batch, kv_head, head;
  Place place;
};

// Neighbouring blocks share keys; the long ones of causal attention come first: the last queries, the first keys.
template <bool kOfKeys>
__device__ Work work_of(const Call& call) {
  unsigned block = blockIdx.x;
  hide_origin(block);
  const unsigned heads = kOfKeys ? 1 : call.group, unit = block / heads, of_head = unit / call.tiles;
  const int tile = unit % call.tiles, kv_head = of_head % call.heads, batch = of_head / call.heads;
  return {batch, kv_head, static_cast<int>(kv_head * call.group + block % heads),
          place_of<kOfKeys>(call, kOfKeys ? tile : call.tiles - 1 - tile)};
}

// ---- which columns count, and how much ------------------------------------------------------------------------------

// Which columns count with rows g and g + 8 of a warp, and from where to where a tile of kCols begins that counts as a
// whole with all the rows that there are.
template <int kCols>
struct Sight {
  int from, to, end;  // for row g, less the 2 t of a lane's first column
  int whole_from, whole_to;

  __device__ Sight(const Place& place, int row, int t) {
    const int rest = place.columns - 1 < place.first + place.high ? place.columns - 1 : place.first + place.high;
    from = row + place.low - 2 * t;
    to = row + place.high - 2 * t;
    end = place.columns - 1 - 2 * t;
    whole_from = place.last() + place.low;
    whole_to = rest - kCols + 1;
  }

  // Makes -infinity of the scores of the columns from `column` on that do not count.
  __device__ void apply(float (&s)[kCols / 8][4], int column) const {
    if (whole_from <= column && column <= whole_to) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int first = from + i / 2 * 8 - column;
      const int last = (to + i / 2 * 8 < end ? to + i / 2 * 8 : end) - column;
#pragma unroll
      for (int j = 0; j < kCols / 8; ++j) {
        if (8 * j + i % 2 < first || 8 * j + i % 2 > last) s[j][i] = -kInfinity;
      }
    }
  }
};

// q·k -> scores, times log2(e).
template <int kCount>
__device__ void to_scores(float (&s)[kCount][4], const Call& call) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[j][i] *= call.exponent;
  }
  if (call.cap == 0.0f) return;
  const float twice = 2.0f * kLog2e * call.inverse;
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // tanh(x) = 1 - 2 / (1 + exp(2 x))
      s[j][i] = call.cap * (1.0f - 2.0f * reciprocal_fast(1.0f + exp2_fast(s[j][i] * twice)));
    }
  }
}

// ---- what launchers share -------------------------------------------------------------------------------------------

// Thread blocks for each head of so many rows.
inline int64_t tiles_of(const pyft_attention& attention, int64_t rows) {
  return attention.cu_seqlens_q == nullptr ? ceil_div(rows, kOwnRows) : rows / kOwnRows + attention.sequences;
}

// PYFT_OK where these kernels can do it on this GPU; `call` <- what they are told.
pyft_status call_of(const pyft_attention& attention, pyft_dtype dtype, Call& call);

template <int kDim>
using Dim = std::integral_constant<int, kDim>;

// run(a value of the type, Dim of the least that both head dims fit in), a status.
template <class Run>
pyft_status with_shape(const pyft_attention& attention, pyft_dtype dtype, const Run& run) {
  const int64_t dim = attention.dim > attention.v_dim ? attention.dim : attention.v_dim;
  const auto of_type = [&](auto type) {
    return dim <= 64 ? run(type, Dim<64>{}) : dim <= 128 ? run(type, Dim<128>{}) : run(type, Dim<256>{});
  };
  return dtype == PYFT_F16 ? of_type(__half{}) : of_type(__nv_bfloat16{});
}

}  // namespace pyft
