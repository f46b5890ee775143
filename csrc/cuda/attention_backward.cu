// The gradients of attention's inputs: pyft.h says what is computed, attention.h how the work is divided. Two passes,
// which are one with the roles of queries and keys exchanged:
//
//   own rows    columns      in registers, [own rows x columns]           results, [own rows x head]
//   q, d_o      k, v         s = q kᵀ,   dp = d_o vᵀ                      dq += ds k
//   k, v        q, d_o       sᵀ = k qᵀ,  dpᵀ = v d_oᵀ                     dk += dsᵀ q,  dv += pᵀ d_o
//
// with p = exp(score - lse), ds = p (dp - delta), times 1 - (score / softcap)² where capped; scale is left to the end.
// Two products are done in both: adding up dq in the second pass would need atomics and fp32 memory. Here a thread
// block alone has all there is to add to its results, in a fixed order. For dk and dv it goes through the query heads
// that share its keys, one after another.
//
// lse and delta are of own rows, a lane's two, or of columns: then a lane has that of one or two of them, read with the
// tile, and gives them to others by shuffles.
//
// Two results of 64 registers each leave room for one matrix of own rows: with heads of more than 64, v is read from
// shared memory for each tile; with more than 128 there is no room for it, and dk and dv are two kernels' (five
// products instead of four). Tiles are of 16 columns there.
//
// On a T4 a multiprocessor has registers and shared memory for three (dq) or two thread blocks where heads are up to
// 64, two where they are up to 128, one of twice the threads where they are larger: 12 or 8 warps.
#include "attention.h"

namespace {

using pyft::Call;
using pyft::Rows;
using pyft::View;

// What a kernel gives. kKeyGradients is for heads of up to 128.
enum class Gives { kDq, kKeyGradients, kDk, kDv };

template <Gives kGives>
constexpr bool kOfKeys = kGives != Gives::kDq;

template <int kDim, Gives kGives>
using BackwardShape = pyft::Shape<kDim, kDim == 256 || (kOfKeys<kGives> && kDim == 128) ? 16 : 32>;

template <int kDim, Gives kGives>
constexpr int kBackwardBlocks = kDim == 64    ? (kOfKeys<kGives> ? 2 : 3)
                                : kDim == 128 ? 2
                                              : 1;  // on a multiprocessor

// What the kernels read and write. Of queries: q, d_o, dq; of keys: k, v, dk, dv.
template <class T>
struct Tensors {
  View<const T> own[2], columns[2];
  View<T> results[2];
  const float* lse;
  const float* delta;
};

// lse as an exponent of 2 that makes 0 of rows that see nothing.
__device__ float exponent(float lse) { return lse == -pyft::kInfinity ? pyft::kInfinity : lse * pyft::kLog2e; }

// lse and delta of a tile's kCols queries: value i of all is with lane i % 32, those of lse first.
template <int kCols>
struct Sums {
  float value[kCols / 16];

  __device__ void load(const float* lse, const float* delta, int64_t row, int column, int count) {
#pragma unroll
    for (int i = 0; i < kCols / 16; ++i) {
      const int at = threadIdx.x % 32 + 32 * i;
      const int query = column + at % kCols;
      value[i] = at < kCols ? pyft::kInfinity : 0.0f;
      if (query < count) value[i] = at < kCols ? exponent(lse[row + query]) : delta[row + query];
    }
  }

  __device__ float lse_of(int query) const { return __shfl_sync(pyft::kWholeWarp, value[0], query); }
  __device__ float delta_of(int query) const {
    return __shfl_sync(pyft::kWholeWarp, value[kCols / 32], kCols % 32 + query);
  }
};

// dp of what softcap tanh(x) goes on to -> of x. Of what does not count, the score is -infinity.
template <int kCount>
__device__ void cap_gradient(const float (&score)[kCount][4], float inverse, float (&dp)[kCount][4]) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float share = fmaxf(score[j][i] * inverse, -1.0f);
      dp[j][i] *= 1.0f - share * share;
    }
  }
}

template <class T, int kDim, Gives kGives>
__device__ void backward(const Call& call, const Tensors<T>& tensors) {
  using S = BackwardShape<kDim, kGives>;
  constexpr int kCols = S::kCols, kPart = S::kPart, kCount = kCols / 8;
  constexpr bool kKeys = kOfKeys<kGives>, kFirst = kGives != Gives::kDv;
  constexpr bool kSecond = kGives == Gives::kDv || kGives == Gives::kKeyGradients;
  constexpr bool kOwnInShared = kGives == Gives::kKeyGradients && kDim == 128;  // v
  constexpr int kOwn = kOwnInShared ? S::kOwn : 0, kHalves = kFirst ? 2 * S::kHalves : S::kHalves;
  PYFT_SHARED(pyft::Line, lines, (S::kMemory + kOwn + kHalves) / 8);
  uint4* memory = reinterpret_cast<uint4*>(lines);
  uint4* own_memory = memory + S::kMemory;
  float4* halves = reinterpret_cast<float4*>(own_memory + kOwn);

  const pyft::Work work = pyft::work_of<kKeys>(call);
  const pyft::Place& place = work.place;
  if (place.first >= place.rows) return;
  const int own_head = kKeys ? work.kv_head : work.head, column_head = kKeys ? work.head : work.kv_head;
  const pyft::Lane<S> lane;
  const int row = place.first + lane.row + lane.g;  // and row + 8
  const int begin = place.begin<kCols>(), end = place.end();
  Rows<const T> columns[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    columns[i] = pyft::rows_of(tensors.columns[i], work.batch, column_head, place.column, place.columns);
  }
  int64_t sums_row = int64_t{work.batch * call.heads * call.group + work.head} * call.q_len;
  sums_row += kKeys ? place.column : place.row;

  pyft::Stage<const T, S> start;
  Sums<kCols> sums;
  start.load(columns, begin);
  if constexpr (kKeys) sums.load(tensors.lse, tensors.delta, sums_row, begin, place.columns);
  const Rows<const T> first_own = pyft::rows_of(tensors.own[0], work.batch, own_head, place.row, place.rows);
  const Rows<const T> second_own = pyft::rows_of(tensors.own[1], work.batch, own_head, place.row, place.rows);
  pyft::Fragments<kPart> own[2];
  pyft::read_own(first_own, place.first, lane, memory, own[0]);
  if constexpr (kOwnInShared) {
    pyft::copy_rows<const T, kDim, pyft::kOwnRows, S::kThreads>(second_own, place.first, own_memory);
  } else if constexpr (kFirst) {
    pyft::read_own(second_own, place.first, lane, memory, own[1]);
  }
  start.store(columns, begin, memory);
  __syncthreads();

  float row_lse[2] = {}, row_delta[2] = {};
  if constexpr (!kKeys) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (row + 8 * i >= place.rows) continue;
      row_lse[i] = exponent(tensors.lse[sums_row + row + 8 * i]);
      row_delta[i] = tensors.delta[sums_row + row + 8 * i];
    }
  }

  float result[2][kPart / 8][4] = {};
  const pyft::SharedAddress origin = pyft::shared_address(memory);
  const pyft::SharedAddress own_origin = pyft::shared_address(own_memory) + lane.as_a() + lane.row * kDim * 2;
  const pyft::Sight<kCols> sight(place, row, lane.t);
  int now = 0, head = 0, column = begin;
  for (bool more = begin < end; more;) {
    const pyft::SharedAddress first = origin + now * 2 * S::kTile * 16, second = first + S::kTile * 16;
    float s[kCount][4] = {}, dp[kCount][4] = {};
    pyft::multiply_columns<T, S>(own[0], first + lane.as_b(), s);
    if constexpr (kOwnInShared) {
      pyft::multiply_columns<T, S>(own_origin, second + lane.as_b(), dp);
    } else if constexpr (kFirst) {
      pyft::multiply_columns<T, S>(own[1], second + lane.as_b(), dp);
    }
    if constexpr (S::kSplit == 2) {
      pyft::give_half(s, lane.warp, halves);
      if constexpr (kFirst) pyft::give_half(dp, lane.warp, halves + S::kHalves);
      __syncthreads();
      pyft::take_half(s, lane.warp, halves);
      if constexpr (kFirst) pyft::take_half(dp, lane.warp, halves + S::kHalves);
    }
    pyft::to_scores(s, call);
    sight.apply(s, column);
    if constexpr (kFirst) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) dp[j][i] -= kKeys ? sums.delta_of(8 * j + 2 * lane.t + i % 2) : row_delta[i / 2];
      }
      if (call.cap != 0.0f) cap_gradient(s, call.inverse, dp);
    }
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[j][i] = pyft::exp2_fast(s[j][i] - (kKeys ? sums.lse_of(8 * j + 2 * lane.t + i % 2) : row_lse[i / 2]));
        dp[j][i] *= s[j][i];
      }
    }

    // The next tile: not earlier, when there are s and dp, for want of registers.
    column += kCols;
    more = column < end;
    if constexpr (kKeys) {
      if (!more && head + 1 < call.group) {
        ++head;
        columns[0].first += tensors.columns[0].head_stride;
        columns[1].first += tensors.columns[1].head_stride;
        sums_row += call.q_len;
        column = begin;
        more = true;
      }
    }
    pyft::Stage<const T, S> next;
    if (more) {
      next.load(columns, column);
      if constexpr (kKeys) sums.load(tensors.lse, tensors.delta, sums_row, column, place.columns);
    }
    pyft::Fragments<kCols> weights;
    if constexpr (kSecond) {
      pyft::round_to<T>(s, weights);
      pyft::add_columns<T, S>(weights, second + lane.as_a(), result[1]);
      __syncwarp();  // the compiler is not to read for the next product in this one: it would run out of registers
    }
    if constexpr (kFirst) {
      pyft::round_to<T>(dp, weights);
      pyft::add_columns<T, S>(weights, first + lane.as_a(), result[0]);
    }
    now ^= 1;
    if (more) next.store(columns, column, memory + now * 2 * S::kTile);
    __syncthreads();
  }

  const auto [batch, kv_head, q_head, there] = pyft::work_of<kKeys>(call);  // once more: registers are scarce
#pragma unroll
  for (int i = kFirst ? 0 : 1; i < (kSecond ? 2 : 1); ++i) {
    if (tensors.results[i].data == nullptr) continue;
    const float scale = i == 0 ? call.scale : 1.0f, factor[2] = {scale, scale};
    if (i == 1) __syncthreads();
    pyft::write_own(result[i], factor, lane, memory, there.first,
                    pyft::rows_of(tensors.results[i], batch, kKeys ? kv_head : q_head, there.row, there.rows));
  }
}

template <class T, int kDim, Gives kGives>
__global__ void __launch_bounds__(BackwardShape<kDim, kGives>::kThreads, kBackwardBlocks<kDim, kGives>)
    attention_backward(Call call, Tensors<T> tensors) {
  if constexpr (pyft::kCanMultiply<T>) backward<T, kDim, kGives>(call, tensors);
}

// ---- launcher -------------------------------------------------------------------------------------------------------

template <class T, int kDim, Gives kGives>
pyft_status launch(Call call, const pyft_attention& a, const Tensors<T>& tensors, cudaStream_t stream) {
  const int64_t tiles = pyft::tiles_of(a, kOfKeys<kGives> ? a.k_len : a.q_len);
  const int64_t grid = tiles * a.batch * (kOfKeys<kGives> ? a.kv_heads : a.q_heads);
  if (grid > pyft::kMaxGrid) return PYFT_BAD_ARGUMENT;
  call.tiles = static_cast<int>(tiles);
  if (grid == 0) return PYFT_OK;
  constexpr int kThreads = BackwardShape<kDim, kGives>::kThreads;
  const auto kernel = attention_backward<T, kDim, kGives>;
  PYFT_LAUNCH(kernel, static_cast<unsigned>(grid), kThreads, stream, call, tensors);
  return pyft::launch_status();
}

}  // namespace

extern "C" pyft_status pyft_cuda_attention_backward(const pyft_attention* attention,
                                                    const pyft_attention_backward* backward, pyft_dtype dtype,
                                                    void* stream) {
  const pyft_attention& a = *attention;
  const pyft_attention_backward& b = *backward;
  Call call;
  const pyft_status status = pyft::call_of(a, dtype, call);
  if (status != PYFT_OK) return status;
  return pyft::with_shape(a, dtype, [&](auto type, auto dim) {
    using T = decltype(type);
    const auto q = pyft::view_of<const T>(a.q, a.batch, a.q_heads, a.q_len, a.dim);
    const auto k = pyft::view_of<const T>(a.k, a.batch, a.kv_heads, a.k_len, a.dim);
    const auto v = pyft::view_of<const T>(a.v, a.batch, a.kv_heads, a.k_len, a.v_dim);
    const auto d_o = pyft::view_of<const T>(b.d_o, a.batch, a.q_heads, a.q_len, a.v_dim);
    const auto dq = pyft::view_of<T>(b.dq, a.batch, a.q_heads, a.q_len, a.dim);
    const auto dk = pyft::view_of<T>(b.dk, a.batch, a.kv_heads, a.k_len, a.dim);
    const auto dv = pyft::view_of<T>(b.dv, a.batch, a.kv_heads, a.k_len, a.v_dim);
    const Tensors<T> of_queries = {{q, d_o}, {k, v}, {dq, {}}, b.lse, b.delta};
    const Tensors<T> of_keys = {{k, v}, {q, d_o}, {dk, dv}, b.lse, b.delta};
    const auto on = static_cast<cudaStream_t>(stream);
    pyft_status done = PYFT_OK;
    if (dq.data != nullptr) done = launch<T, dim, Gives::kDq>(call, a, of_queries, on);
    if constexpr (dim <= 128) {
      const bool wanted = dk.data != nullptr || dv.data != nullptr;
      if (wanted && done == PYFT_OK) done = launch<T, dim, Gives::kKeyGradients>(call, a, of_keys, on);
    } else {
      if (dk.data != nullptr && done == PYFT_OK) done = launch<T, dim, Gives::kDk>(call, a, of_keys, on);
      if (dv.data != nullptr && done == PYFT_OK) done = launch<T, dim, Gives::kDv>(call, a, of_keys, on);
    }
    return done;
  });
}
