// o = softmax(scores) v and the log-sum-exp of the scores, and what the backward pass needs of o: pyft.h says what is
// computed, attention.h how the work is divided; own rows are queries here.
//
// For each tile of keys: s = q kᵀ, the largest score of each row, p = exp2(s - largest), o = o exp2(before - now) + p
// v. A row is four lanes', who share its largest score in two shuffles a tile and its sum in two at the end. Where no
// row has a new largest score, as in most tiles, o is left alone. A sink is a key whose value is 0, before all others.
//
// Thread blocks of query heads that share a head of keys are neighbours, then those of its rows, the last first: they
// find their keys and values in the L2 cache, and with causal attention the long ones do not begin at the end.
//
// On a T4 a multiprocessor has registers and shared memory for three thread blocks where heads are up to 64, two where
// they are up to 128, one of twice the threads where they are larger: 12 or 8 warps.
#include "attention.h"

namespace {

using pyft::Call;
using pyft::Rows;
using pyft::View;

// A tile is 4, 8 and 8 KB of keys and as much of values.
template <int kDim>
using ForwardShape = pyft::Shape<kDim, kDim == 256 ? 16 : 32>;

template <int kDim>
constexpr int kForwardBlocks = kDim == 64    ? 3
                               : kDim == 128 ? 2
                                             : 1;  // on a multiprocessor

// The largest of four lanes' values, and their sum.
__device__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(pyft::kWholeWarp, x, 1));
  return fmaxf(x, __shfl_xor_sync(pyft::kWholeWarp, x, 2));
}

__device__ float row_sum(float x) {
  x += __shfl_xor_sync(pyft::kWholeWarp, x, 1);
  return x + __shfl_xor_sync(pyft::kWholeWarp, x, 2);
}

// Of rows g and g + 8: the largest score so far, and this lane's part of the sum of exp2(score - largest).
struct Softmax {
  float largest[2], sum[2];

  // scores -> exp2(scores - largest); factor: what everything before is to be multiplied by.
  template <int kCount>
  __device__ void add(float (&s)[kCount][4], float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float top = fmaxf(s[0][2 * i], s[0][2 * i + 1]);
#pragma unroll
      for (int j = 1; j < kCount; ++j) top = fmaxf(top, fmaxf(s[j][2 * i], s[j][2 * i + 1]));
      top = fmaxf(largest[i], row_max(top));
      const float base = top == -pyft::kInfinity ? 0.0f : top;
      factor[i] = pyft::exp2_fast(largest[i] - base);
      largest[i] = top;
      float total = 0.0f;
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
#pragma unroll
        for (int c = 2 * i; c < 2 * i + 2; ++c) {
          s[j][c] = pyft::exp2_fast(s[j][c] - base);
          total += s[j][c];
        }
      }
      sum[i] = __fmaf_rn(sum[i], factor[i], total);
    }
  }
};

template <class T, int kDim>
__device__ void forward(const Call& call, const View<const T>& q_view, const View<const T>& k_view,
                        const View<const T>& v_view, const float* sinks, const View<T>& o_view, float* lse) {
  using S = ForwardShape<kDim>;
  constexpr int kCols = S::kCols, kPart = S::kPart, kCount = kCols / 8;
  PYFT_SHARED(pyft::Line, lines, (S::kMemory + S::kHalves) / 8);
  uint4* memory = reinterpret_cast<uint4*>(lines);
  float4* halves = reinterpret_cast<float4*>(memory + S::kMemory);

  const pyft::Work work = pyft::work_of<false>(call);
  const pyft::Place& place = work.place;
  if (place.first >= place.rows) return;
  const Rows<const T> columns[2] = {pyft::rows_of(k_view, work.batch, work.kv_head, place.column, place.columns),
                                    pyft::rows_of(v_view, work.batch, work.kv_head, place.column, place.columns)};
  const pyft::Lane<S> lane;
  const int row = place.first + lane.row + lane.g;  // and row + 8

  int column = place.begin<kCols>();
  const int end = place.end();
  pyft::Stage<const T, S> begin;
  begin.load(columns, column);
  pyft::Fragments<kPart> q;
  pyft::read_own(pyft::rows_of(q_view, work.batch, work.head, place.row, place.rows), place.first, lane, memory, q);
  begin.store(columns, column, memory);
  __syncthreads();

  const float sink = sinks == nullptr ? -pyft::kInfinity : sinks[work.head];
  const float first_sum = lane.t == 0 && sink != -pyft::kInfinity ? 1.0f : 0.0f;
  Softmax softmax = {{sink * pyft::kLog2e, sink * pyft::kLog2e}, {first_sum, first_sum}};
  float o[kPart / 8][4] = {};
  const pyft::Sight<kCols> sight(place, row, lane.t);
  const pyft::SharedAddress k_origin = pyft::shared_address(memory) + lane.as_b();
  const pyft::SharedAddress v_origin = pyft::shared_address(memory + S::kTile) + lane.as_a();
  for (int now = 0; column < end; column += kCols, now ^= 1) {
    const bool more = column + kCols < end;
    pyft::Stage<const T, S> next;
    if (more) next.load(columns, column + kCols);
    const int offset = now * 2 * S::kTile;
    float s[kCount][4] = {};
    pyft::multiply_columns<T, S>(q, k_origin + offset * 16, s);
    if constexpr (S::kSplit == 2) {
      pyft::give_half(s, lane.warp, halves);
      __syncthreads();
      pyft::take_half(s, lane.warp, halves);
    }
    pyft::to_scores(s, call);
    sight.apply(s, column);
    float factor[2];
    softmax.add(s, factor);
    if (__any_sync(pyft::kWholeWarp, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
      for (int n = 0; n < kPart / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) o[n][i] *= factor[i / 2];
      }
    }
    pyft::Fragments<kCols> p;
    pyft::round_to<T>(s, p);
    pyft::add_columns<T, S>(p, v_origin + offset * 16, o);
    if (more) next.store(columns, column + kCols, memory + 2 * S::kTile - offset);
    __syncthreads();
  }

  const auto [batch, kv_head, head, own] = pyft::work_of<false>(call);  // once more: registers are scarce
  float factor[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int r = own.first + lane.row + lane.g + 8 * i;
    const float sum = row_sum(softmax.sum[i]);
    const bool sees = own.counts(r);
    factor[i] = sees ? __fdiv_rn(1.0f, sum) : 0.0f;
    if (lane.t == 0 && lane.half == 0 && r < own.rows) {
      const float sink_alone = sinks == nullptr ? -pyft::kInfinity : sinks[head];
      const float value = sees ? (softmax.largest[i] + log2f(sum)) * pyft::kLn2 : sink_alone;
      lse[int64_t{batch * call.heads * call.group + head} * call.q_len + own.row + r] = value;
    }
  }
  const Rows<T> out = pyft::rows_of(o_view, batch, head, own.row, own.rows);
  pyft::write_own(o, factor, lane, memory, own.first, out);
}

template <class T, int kDim>
__global__ void __launch_bounds__(ForwardShape<kDim>::kThreads, kForwardBlocks<kDim>)
    attention(Call call, View<const T> q, View<const T> k, View<const T> v, const float* sinks, View<T> o, float* lse) {
  if constexpr (pyft::kCanMultiply<T>) forward<T, kDim>(call, q, k, v, sinks, o, lse);
}

// ---- delta ----------------------------------------------------------------------------------------------------------

constexpr int kDeltaThreads = 128, kDeltaLanes = 8;  // lanes a row

template <class T>
__global__ void __launch_bounds__(kDeltaThreads)
    attention_delta(View<const T> o_view, View<const T> d_o_view, int64_t heads, int64_t seq, int64_t rows,
                    const float* d_lse, int64_t d_lse_batch, int64_t d_lse_head, int64_t d_lse_seq, float* delta) {
  const int64_t row = (int64_t{blockIdx.x} * kDeltaThreads + threadIdx.x) / kDeltaLanes;
  const bool is_row = row < rows;
  const int64_t at = is_row ? row % seq : 0, head = is_row ? row / seq % heads : 0,
                batch = is_row ? row / seq / heads : 0;
  const Rows<const T> o = pyft::rows_of(o_view, batch, head, at, is_row),
                      d_o = pyft::rows_of(d_o_view, batch, head, at, is_row);
  float sum = 0.0f;
  for (int column = threadIdx.x % kDeltaLanes * 8; column < o.dim; column += kDeltaLanes * 8) {
    const uint4 a = pyft::read_any(o, 0, column), b = pyft::read_any(d_o, 0, column);
    T x[8], y[8];
    memcpy(x, &a, sizeof x);
    memcpy(y, &b, sizeof y);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = __fmaf_rn(pyft::widen(x[i]), pyft::widen(y[i]), sum);
  }
#pragma unroll
  for (int lanes = kDeltaLanes / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(pyft::kWholeWarp, sum, lanes);
  if (!is_row || threadIdx.x % kDeltaLanes != 0) return;
  if (d_lse != nullptr) sum -= d_lse[batch * d_lse_batch + head * d_lse_head + at * d_lse_seq];
  delta[row] = sum;
}

template <class T, int kDim>
pyft_status launch(Call call, const pyft_attention& a, const pyft_head_view& o, float* lse, cudaStream_t stream) {
  const int64_t tiles = pyft::tiles_of(a, a.q_len), grid = tiles * a.batch * a.q_heads;
  if (grid > pyft::kMaxGrid) return PYFT_BAD_ARGUMENT;
  call.tiles = static_cast<int>(tiles);
  if (grid == 0) return PYFT_OK;
  const auto kernel = attention<T, kDim>;
  PYFT_LAUNCH(kernel, static_cast<unsigned>(grid), ForwardShape<kDim>::kThreads, stream, call,
              pyft::view_of<const T>(a.q, a.batch, a.q_heads, a.q_len, a.dim),
              pyft::view_of<const T>(a.k, a.batch, a.kv_heads, a.k_len, a.dim),
              pyft::view_of<const T>(a.v, a.batch, a.kv_heads, a.k_len, a.v_dim), a.sinks,
              pyft::view_of<T>(o, a.batch, a.q_heads, a.q_len, a.v_dim), lse);
  return pyft::launch_status();
}

// `shift` and how far a query sees, without overflow.
int64_t add_far(int64_t shift, int64_t reach) {
  constexpr int64_t kEnd = int64_t{1} << 60;
  const auto clamp = [](int64_t x) { return x < -kEnd ? -kEnd : x > kEnd ? kEnd : x; };
  return clamp(shift) + clamp(reach);
}

}  // namespace

namespace pyft {

pyft_status call_of(const pyft_attention& a, pyft_dtype dtype, Call& call) {
  constexpr int64_t kMaxDim = 256, kUnbounded = int64_t{1} << 40;
  const bool sizes = a.batch >= 0 && a.batch <= kMaxRows && a.kv_heads >= 1 && a.q_heads >= a.kv_heads &&
                     a.q_heads <= kMaxRows && a.q_heads % a.kv_heads == 0 && a.q_len >= 0 && a.q_len <= kMaxRows &&
                     a.k_len >= 0 && a.k_len <= kMaxRows && a.dim >= 1 && a.dim <= kMaxDim && a.v_dim >= 1 &&
                     a.v_dim <= kMaxDim;
  const bool packed = a.cu_seqlens_q != nullptr;
  const bool lengths = packed ? a.cu_seqlens_k != nullptr && a.batch <= 1 && a.sequences >= 0 && a.sequences <= kMaxRows
                              : a.cu_seqlens_k == nullptr;
  const bool asked = a.bias == nullptr && a.slopes == nullptr && a.threshold == 0;
  if (!sizes || !lengths || !asked || (dtype != PYFT_F16 && dtype != PYFT_BF16)) return PYFT_BAD_ARGUMENT;
  if (dtype == PYFT_BF16) {
    int device, major;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) {
      return launch_status();
    }
    if (major < 8) return PYFT_BAD_ARGUMENT;
  }
  call = {};
  call.heads = static_cast<int>(a.kv_heads);
  call.group = static_cast<int>(a.q_heads / a.kv_heads);
  call.q_len = static_cast<int>(a.q_len);
  call.k_len = static_cast<int>(a.k_len);
  call.cu_q = a.cu_seqlens_q;
  call.cu_k = a.cu_seqlens_k;
  call.sequences = static_cast<int>(a.sequences);
  call.low = a.left == PYFT_UNBOUNDED ? -kUnbounded : add_far(a.shift, -a.left);
  call.high = a.right == PYFT_UNBOUNDED ? kUnbounded : add_far(a.shift, a.right);
  call.scale = a.scale;
  call.exponent = a.scale * kLog2e;
  call.cap = a.softcap * kLog2e;
  call.inverse = call.cap == 0.0f ? 0.0f : 1.0f / call.cap;
  return PYFT_OK;
}

}  // namespace pyft

extern "C" {

pyft_status pyft_cuda_attention(const pyft_attention* attention, const pyft_head_view* o, float* lse, pyft_dtype dtype,
                                void* stream) {
  Call call;
  const pyft_status status = pyft::call_of(*attention, dtype, call);
  if (status != PYFT_OK) return status;
  return pyft::with_shape(*attention, dtype, [&](auto type, auto dim) {
    return launch<decltype(type), dim>(call, *attention, *o, lse, static_cast<cudaStream_t>(stream));
  });
}

pyft_status pyft_cuda_attention_delta(int64_t batch, int64_t heads, int64_t seq, int64_t dim, const pyft_head_view* o,
                                      const pyft_head_view* d_o, const float* d_lse, const int64_t d_lse_strides[3],
                                      float* delta, pyft_dtype dtype, void* stream) {
  if (batch < 0 || heads < 0 || seq < 0 || seq > pyft::kMaxRows || dim < 0 || dim > pyft::kMaxRows ||
      (dtype != PYFT_F16 && dtype != PYFT_BF16))
    return PYFT_BAD_ARGUMENT;
  const int64_t rows = batch * heads * seq, grid = pyft::ceil_div(rows * kDeltaLanes, kDeltaThreads);
  if (grid > pyft::kMaxGrid) return PYFT_BAD_ARGUMENT;
  if (rows == 0) return PYFT_OK;
  const bool has_d_lse = d_lse != nullptr;
  const auto run = [&](auto type) {
    using T = decltype(type);
    const auto kernel = attention_delta<T>;
    PYFT_LAUNCH(kernel, static_cast<unsigned>(grid), kDeltaThreads, static_cast<cudaStream_t>(stream),
                pyft::view_of<const T>(*o, batch, heads, seq, dim),
                pyft::view_of<const T>(*d_o, batch, heads, seq, dim), heads, seq, rows, d_lse,
                has_d_lse ? d_lse_strides[0] : 0, has_d_lse ? d_lse_strides[1] : 0, has_d_lse ? d_lse_strides[2] : 0,
                delta);
    return pyft::launch_status();
  };
  return dtype == PYFT_F16 ? run(__half{}) : run(__nv_bfloat16{});
}

}  // extern "C"
