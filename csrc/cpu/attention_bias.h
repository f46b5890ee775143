// d_bias, and delta: what the gradients of a row have in common.
#pragma once

#include "attention_backward.h"

namespace {

// One tile of d_bias: dS summed over what one value of the bias served, in the order of batch, head, queries, keys.
template <class M, pyft_dtype D>
struct BiasGradient {
  using V = typename M::V;

  BiasGradient(const AttentionCall& call, Arena& arena, int64_t)
      : call(call), tiles(call, arena), sums(arena.words(kKeys * kQueries)) {}
  const AttentionCall& call;
  Backward<M, D> tiles;
  float* sums;

  void run(const AttentionItem& item) {
    const pyft_attention& a = tiles.a;
    const int64_t* strides = a.bias_strides;
    const int64_t batch = item.sequence->batch;  // of the row, or the first of all
    memset(sums, 0, sizeof(float) * kKeys * kQueries);
    for (int64_t b = batch; b < (strides[0] ? batch + 1 : a.batch); ++b) {
      Sequence s = *item.sequence;
      s.batch = b;
      for (int64_t h = item.head; h < (strides[1] ? item.head + 1 : a.q_heads); ++h) {
        const int64_t q_tiles = strides[2] ? item.tile + 1 : tiles_of(a.q_len, kQueries);
        for (int64_t tile = item.tile; tile < q_tiles; ++tile) add(tiles.queries_of(s, h, tile), item.key_tile);
      }
    }
    if (a.bias_dtype == PYFT_F32) return store<PYFT_F32>(item);
    if (a.bias_dtype == PYFT_F16) return store<PYFT_F16>(item);
    store<PYFT_BF16>(item);
  }

 private:
  void add(const Queries& queries, int64_t key_tile) {
    const bool one = tiles.a.bias_strides[3] != 0;
    const int64_t first = first_tile(queries), last = last_tile(queries);
    if (one && (key_tile < first || key_tile >= last)) return;
    tiles.load_queries(queries);
    for (int64_t tile = one ? key_tile : first; tile < (one ? key_tile + 1 : last); ++tile) {
      const Keys keys = seen_keys(queries, tile);
      tiles.load_keys(queries.sequence, tiles.kv_head(queries.head), keys);
      tiles.template gradients_of_scores<true>(queries, keys, sums + (keys.begin - tile * kKeys) * kQueries);
    }
  }

  // Sums of columns and rows where they share a value.
  template <pyft_dtype Bias>
  void store(const AttentionItem& item) const {
    const pyft_attention& a = tiles.a;
    const int64_t* strides = a.bias_strides;
    const int64_t heads = strides[1] ? a.q_heads : 1, q_len = strides[2] ? a.q_len : 1,
                  k_len = strides[3] ? a.k_len : 1;
    const int64_t begin = strides[2] ? item.tile * kQueries : 0, first = strides[3] ? item.key_tile * kKeys : 0;
    auto* out = static_cast<typename Dtype<Bias>::type*>(call.d_bias) +
                ((item.sequence->batch * heads + item.head) * q_len + begin) * k_len + first;
    for (int64_t i = 0; i < kQueries && begin + i < q_len; ++i) {
      for (int64_t j = 0; j < kKeys && first + j < k_len; ++j) {
        float sum = 0.0f;
        for (int64_t jj = j; jj < (strides[3] ? j + 1 : kKeys); ++jj) {
          for (int64_t ii = i; ii < (strides[2] ? i + 1 : kQueries); ++ii) sum += sums[jj * kQueries + ii];
        }
        out[i * k_len + j] = Dtype<Bias>::store(sum);
      }
    }
  }
};

// In double precision: P (dP - delta) is where most of the digits cancel.
template <class V, pyft_dtype D>
void delta_rows(const pyft_head_view& o, const pyft_head_view& d_o, int64_t batch, int64_t head, int64_t begin,
                int64_t end, int64_t dim, const float* d_lse, int64_t d_lse_stride, float* delta) {
  for (int64_t r = begin; r < end; ++r) {
    const auto *x = at<D>(o, batch, head, r), *y = at<D>(d_o, batch, head, r);
    double sums[V::kLanes] = {};
    for_vectors<V>(dim, [&](auto lanes, int64_t i) {
      float a[V::kLanes], b[V::kLanes];
      V::template store<PYFT_F32>(a, lanes.template load<D>(x + i));
      V::template store<PYFT_F32>(b, lanes.template load<D>(y + i));
      for (int n = 0; n < V::kLanes; ++n) sums[n] += static_cast<double>(a[n]) * b[n];
    });
    for (int n = 1; n < V::kLanes; ++n) sums[0] += sums[n];
    delta[r] = static_cast<float>(sums[0] - (d_lse ? d_lse[r * d_lse_stride] : 0.0f));
  }
}

}  // namespace
