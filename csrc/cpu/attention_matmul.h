// Products of the matrices of a tile. They live in scratch as words of 32 bits: an fp32 number, or a pair of 16-bit
// numbers that are multiplied and added together, one behind the other along the dimension the product sums over.
// `M` says which (Singles<V> here):
//
//   kPairs              numbers in a word
//   multiply(a, b, c)   c + the products of a's and b's words
//   load_rows<D>        rows of numbers -> rows of words (pairs of columns), zeros behind them
//   load_columns<D>     two rows of numbers -> one of words (pairs of rows)
//   store_row, store_column   a vector of fp32 as words of either kind
#pragma once

#include "functions.h"

namespace {

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Scratch, handed out in pieces aligned to 64 bytes; without memory it counts.
struct Arena {
  char* memory;
  int64_t used = 0;
  float* words(int64_t n) {
    float* piece = reinterpret_cast<float*>(memory ? memory + used : nullptr);
    used += round_up(n * 4, 64);
    return piece;
  }
};

// fp32 numbers; other dtypes are widened.
template <class Vector>
struct Singles {
  using V = Vector;
  using Floats = typename V::Floats;
  static constexpr int kPairs = 1;
  static constexpr int kRows = V::kLanes == 16 ? 8 : 4;  // rows of c in registers, two vectors each

  static Floats multiply(Floats a, Floats b, Floats c) { return V::fma(a, b, c); }

  template <pyft_dtype D>
  static void load_row(const typename Dtype<D>::type* x, int64_t cols, float* out, int64_t width) {
    for_vectors<V>(cols,
                   [&](auto lanes, int64_t i) { V::template store<PYFT_F32>(out + i, lanes.template load<D>(x + i)); });
    for (int64_t i = round_up(cols, V::kLanes); i < width; i += V::kLanes)
      V::template store<PYFT_F32>(out + i, Floats{});
  }
  template <pyft_dtype D>
  static void load_columns(const typename Dtype<D>::type* x, const typename Dtype<D>::type*, int64_t cols, float* out) {
    load_row<D>(x, cols, out, round_up(cols, V::kLanes));
  }
  static void store_row(float* row, int64_t i, Floats x) { V::template store<PYFT_F32>(row + i, x); }
  static void store_column(float* row, int64_t i, const Floats* x) { V::template store<PYFT_F32>(row + i, *x); }
};

// Words of a row of `cols` numbers: padded, that rows can be turned in blocks and loaded in whole vectors.
template <class M>
int64_t row_words(int64_t cols) {
  return round_up((cols + M::kPairs - 1) / M::kPairs, 16);
}
template <class M>
int64_t column_words(int64_t cols) {
  return round_up(cols, M::V::kLanes);
}

// rows x cols of x -> words [round_up(rows, pad)][row_words(cols)], zeros in rows that are not there.
template <class M, pyft_dtype D>
void load_rows(const typename Dtype<D>::type* x, int64_t stride, int64_t rows, int64_t cols, int64_t pad, float* out) {
  const int64_t width = row_words<M>(cols), padded = round_up(rows, pad);
  for (int64_t r = 0; r < rows; ++r) M::template load_row<D>(x + r * stride, cols, out + r * width, width);
  memset(out + rows * width, 0, static_cast<size_t>((padded - rows) * width) * 4);
}

// rows x cols of x -> words [round_up(rows, pad) / kPairs][column_words(cols)].
template <class M, pyft_dtype D>
void load_columns(const typename Dtype<D>::type* x, int64_t stride, int64_t rows, int64_t cols, int64_t pad,
                  float* out) {
  const int64_t width = column_words<M>(cols), padded = round_up(rows, pad) / M::kPairs;
  int64_t r = 0;
  for (; r * M::kPairs < rows; ++r) {
    const auto* row = x + r * M::kPairs * stride;
    M::template load_columns<D>(row, r * M::kPairs + 1 < rows ? row + stride : nullptr, cols, out + r * width);
  }
  memset(out + r * width, 0, static_cast<size_t>((padded - r) * width) * 4);
}

// words [rows][cols], rows and cols multiples of 4 -> [cols][kQueries]
inline void turn(const float* in, int64_t rows, int64_t cols, float* out) {
  using Four = float __attribute__((vector_size(16)));
  using Lanes = int32_t __attribute__((vector_size(16)));
  const Lanes low = {0, 4, 1, 5}, high = {2, 6, 3, 7};
  for (int64_t c = 0; c < cols; c += 4) {
    for (int64_t r = 0; r < rows; r += 4) {
      Four x[4];
      for (int k = 0; k < 4; ++k) memcpy(&x[k], in + (r + k) * cols + c, sizeof x[k]);
      const Four a = __builtin_shuffle(x[0], x[2], low), b = __builtin_shuffle(x[0], x[2], high);
      const Four d = __builtin_shuffle(x[1], x[3], low), e = __builtin_shuffle(x[1], x[3], high);
      const Four y[] = {__builtin_shuffle(a, d, low), __builtin_shuffle(a, d, high), __builtin_shuffle(b, e, low),
                        __builtin_shuffle(b, e, high)};
      for (int k = 0; k < 4; ++k) memcpy(out + (c + k) * kQueries + r, &y[k], sizeof y[k]);
    }
  }
}

// Which k a row m of a product needs: low <= k - m <= high; the others are multiplied with zeros.
struct Band {
  int64_t low, high;
};
constexpr Band kAll = {-(1 << 20), 1 << 20};

// Where the words of a are: a[m][k], or turned: a[k][m].
enum Order { kStraight, kTurned };

// What c holds before: nothing; numbers; numbers, row m still to be multiplied by factor[m].
enum Start { kNothing, kSum, kScaled };

template <class M>
struct Product {
  const float* a;
  int64_t a_stride;
  const float* b;
  int64_t b_stride;
  float* c;
  int64_t c_stride;
  const float* factor;
};

// c[kRows][kVectors vectors] += words [first, last) of a and b, which are summed first: over many tiles what is lost to
// rounding then grows with their number, not with that of the words.
template <class M, Order kOrder, Start kStart, int kRows, int kVectors>
void multiply_block(const Product<M>& p, int64_t m, int64_t n, int64_t first, int64_t last) {
  using V = typename M::V;
  typename V::Floats sums[kRows][kVectors] = {};
  float* c = p.c + m * p.c_stride + n;
  const float* a = kOrder == kTurned ? p.a + first * p.a_stride + m : p.a + m * p.a_stride + first;
  const float* b = p.b + first * p.b_stride + n;
  const int64_t a_row = kOrder == kTurned ? 1 : p.a_stride, a_step = kOrder == kTurned ? p.a_stride : 1;
  for (int64_t k = first; k < last; ++k, a += a_step, b += p.b_stride) {
    typename V::Floats columns[kVectors];
    for (int i = 0; i < kVectors; ++i) columns[i] = V::template load<PYFT_F32>(b + i * V::kLanes);
    for (int r = 0; r < kRows; ++r) {
      const auto row = V::splat(a[r * a_row]);
      for (int i = 0; i < kVectors; ++i) sums[r][i] = M::multiply(row, columns[i], sums[r][i]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kVectors; ++i) {
      float* at = c + r * p.c_stride + i * V::kLanes;
      if constexpr (kStart == kSum) sums[r][i] += V::template load<PYFT_F32>(at);
      if constexpr (kStart == kScaled) {
        sums[r][i] = V::fma(V::template load<PYFT_F32>(at), V::splat(p.factor[m + r]), sums[r][i]);
      }
      V::template store<PYFT_F32>(at, sums[r][i]);
    }
  }
}

// The rows [m, rows) in blocks of kRows, then of half as many, down to one.
template <class M, Order kOrder, Start kStart, int kRows, int kVectors>
void multiply_rows(const Product<M>& p, int64_t m, int64_t rows, int64_t n, int64_t depth, Band band) {
  for (; m + kRows <= rows; m += kRows) {
    const int64_t low = m + band.low > 0 ? m + band.low : 0;
    const int64_t high = m + kRows + band.high < depth ? m + kRows + band.high : depth;
    if (low >= high && kStart != kNothing) continue;
    multiply_block<M, kOrder, kStart, kRows, kVectors>(p, m, n, low / M::kPairs, (high + M::kPairs - 1) / M::kPairs);
  }
  if constexpr (kRows > 1) multiply_rows<M, kOrder, kStart, kRows / 2, kVectors>(p, m, rows, n, depth, band);
}

// c [rows][cols, a multiple of a vector] += a b over `depth` numbers. Columns of b, 16 KiB or less, stay in the first
// level of the cache while all rows of a pass.
template <class M, Order kOrder, Start kStart>
void multiply(const Product<M>& p, int64_t rows, int64_t cols, int64_t depth, Band band = kAll) {
  constexpr int64_t kLanes = M::V::kLanes;
  int64_t n = 0;
  for (; n + 2 * kLanes <= cols; n += 2 * kLanes) {
    multiply_rows<M, kOrder, kStart, M::kRows, 2>(p, 0, rows, n, depth, band);
  }
  if (n < cols) multiply_rows<M, kOrder, kStart, M::kRows, 1>(p, 0, rows, n, depth, band);
}

}  // namespace
