// The gradients of a tile of queries and a tile of keys, and the orders in which tiles are gone through:
//
//   by_query   dq of a tile of queries, over the keys
//   by_key     dk and dv of a tile of keys, over the heads of its kv head and their queries
//   whole      all three at once, over heads, queries and keys; dk and dv of a whole kv head are in scratch
//
// by_query and by_key compute P and dS twice, seven products where whole has five; it needs memory and can only be
// divided by kv heads.
#pragma once

#include "attention_scores.h"

namespace {

template <class M, pyft_dtype D>
struct Backward {
  using V = typename M::V;
  using Floats = typename V::Floats;

  Backward(const AttentionCall& call, Arena& arena)
      : a(call.attention),
        b(*call.backward),
        scores(a, arena, true),
        q_turned(arena.words(row_words<M>(a.dim) * kQueries)),
        do_turned(arena.words(row_words<M>(a.v_dim) * kQueries)),
        q_columns(arena.words(column_words<M>(a.dim) * kQueries / M::kPairs)),
        do_columns(arena.words(column_words<M>(a.v_dim) * kQueries / M::kPairs)),
        k_rows(arena.words(row_words<M>(a.dim) * kKeys)),
        v_rows(arena.words(row_words<M>(a.v_dim) * kKeys)),
        k_columns(b.dq.data ? arena.words(column_words<M>(a.dim) * kKeys / M::kPairs) : nullptr),
        p(arena.words(kKeys * kQueries)),
        ds(arena.words(kKeys * kQueries)),
        p_rows(M::kPairs == 1 ? p : arena.words(kKeys * kQueries / M::kPairs)),
        ds_rows(M::kPairs == 1 ? ds : arena.words(kKeys * kQueries / M::kPairs)),
        dq(arena.words(column_words<M>(a.dim) * kQueries)),
        lse(arena.words(kQueries)),
        delta(arena.words(kQueries)) {}

  const pyft_attention& a;
  const pyft_attention_backward& b;
  Scores<M> scores;
  float *q_turned, *do_turned;    // words [dim][kQueries]
  float *q_columns, *do_columns;  // words [kQueries / kPairs][dim]
  float *k_rows, *v_rows;         // words [kKeys][dim]
  float* k_columns;               // words [kKeys / kPairs][dim]
  float *p, *ds;                  // products, then P and dS: [kKeys][kQueries]
  float *p_rows, *ds_rows;        // words [kKeys][kQueries / kPairs]; the words of ds are [kKeys / kPairs][kQueries]
  float* dq;                      // fp32 [kQueries][dim]
  float *lse, *delta;             // of each query; lse is infinity where P is 0

  int64_t kv_head(int64_t head) const { return head / (a.q_heads / a.kv_heads); }
  int64_t q_words() const { return column_words<M>(a.dim); }
  int64_t v_words() const { return column_words<M>(a.v_dim); }

  Queries queries_of(const Sequence& s, int64_t head, int64_t tile) const {
    const int64_t begin = tile * kQueries, rest = s.queries - begin;
    return {s, head, begin, rest < kQueries ? rest : kQueries};
  }

  void load_queries(const Queries& queries) {
    const Sequence& s = queries.sequence;
    const int64_t row = s.q_begin + queries.begin, count = queries.count, padded = round_up(count, V::kLanes);
    const auto* q = at<D>(a.q, s.batch, queries.head, row);
    const auto* d_o = at<D>(b.d_o, s.batch, queries.head, row);
    load_rows<M, D>(q, a.q.seq_stride, count, a.dim, V::kLanes, k_rows);  // where keys come later
    turn(k_rows, padded, row_words<M>(a.dim), q_turned);
    load_rows<M, D>(d_o, b.d_o.seq_stride, count, a.v_dim, V::kLanes, v_rows);
    turn(v_rows, padded, row_words<M>(a.v_dim), do_turned);
    load_columns<M, D>(q, a.q.seq_stride, count, a.dim, M::kPairs, q_columns);
    load_columns<M, D>(d_o, b.d_o.seq_stride, count, a.v_dim, M::kPairs, do_columns);
    const int64_t first = (s.batch * a.q_heads + queries.head) * a.q_len + row;
    for (int64_t i = 0; i < kQueries; ++i) {
      const bool there = i < count && b.lse[first + i] != -__builtin_inff();
      lse[i] = there ? b.lse[first + i] : __builtin_inff();
      delta[i] = there ? b.delta[first + i] : 0.0f;
    }
  }

  void load_keys(const Sequence& s, int64_t head, const Keys& keys) {
    const int64_t row = s.k_begin + keys.begin;
    const auto *k = at<D>(a.k, s.batch, head, row), *v = at<D>(a.v, s.batch, head, row);
    load_rows<M, D>(k, a.k.seq_stride, keys.count(), a.dim, kStep, k_rows);
    load_rows<M, D>(v, a.v.seq_stride, keys.count(), a.v_dim, kStep, v_rows);
    if (k_columns) load_columns<M, D>(k, a.k.seq_stride, keys.count(), a.dim, kStep, k_columns);
  }

  // P and dS of a tile whose queries and keys are loaded: the words the products of the gradients take, or, for the
  // gradient of the bias, dS in fp32 added to `sums` [kKeys][kQueries].
  template <bool kBias>
  void gradients_of_scores(const Queries& queries, const Keys& keys, float* sums) {
    const int64_t cols = round_up(queries.count, V::kLanes), count = round_up(keys.count(), kStep);
    const Product<M> qk = {k_rows, row_words<M>(a.dim), q_turned, kQueries, p, kQueries, nullptr};
    multiply<M, kStraight, kNothing>(qk, count, cols, a.dim);
    const Product<M> dov = {v_rows, row_words<M>(a.v_dim), do_turned, kQueries, ds, kQueries, nullptr};
    multiply<M, kStraight, kNothing>(dov, count, cols, a.v_dim);
    const Floats scale = V::splat(scores.prepare(p, queries, keys));
    if (scores.kept) scores.fill_kept(queries, keys);
    for (int64_t j = 0; j < count; j += M::kPairs) {
      for (int64_t i = 0; i < cols; i += V::kLanes) {
        const Floats base = V::template load<PYFT_F32>(lse + i), common = V::template load<PYFT_F32>(delta + i);
        Floats x[M::kPairs];
        for (int r = 0; r < M::kPairs; ++r) {
          const int64_t where = (j + r) * kQueries + i;
          const Floats below = V::fma(V::template load<PYFT_F32>(p + where), scale, -base);
          const Floats share = exp2<V, D>(V::clamp(below, -__builtin_inff(), 0.0f) * kLog2E);  // no more than all
          Floats dropped = share, from = V::template load<PYFT_F32>(ds + where);
          if (scores.kept) {
            const Floats kept = V::template load<PYFT_F32>(scores.kept + where);
            dropped *= kept;
            from *= kept;
          }
          x[r] = share * (from - common);
          if constexpr (kBias) {
            V::template store<PYFT_F32>(sums + where, V::template load<PYFT_F32>(sums + where) + x[r]);
          } else {
            if (scores.slope) x[r] *= V::template load<PYFT_F32>(scores.slope + where);
            M::store_row(p_rows + (j + r) * kQueries / M::kPairs, i, dropped);
            M::store_row(ds_rows + (j + r) * kQueries / M::kPairs, i, x[r]);
          }
        }
        if constexpr (!kBias && M::kPairs > 1) M::store_column(ds + j / M::kPairs * kQueries, i, x);
      }
    }
  }

  // Adds a tile's part of the gradients that are asked for; dk and dv begin with the tile's first key.
  void add(const Queries& queries, const Keys& keys, bool to_dq, float* dk, float* dv) {
    gradients_of_scores<false>(queries, keys, nullptr);
    const Band band = band_of(queries, keys), back = {-band.high, -band.low};
    const int64_t row = kQueries / M::kPairs, q_cols = q_words(), v_cols = v_words();
    if (dv) {
      const Product<M> p_do = {p_rows, row, do_columns, v_cols, dv, v_cols, nullptr};
      multiply<M, kStraight, kSum>(p_do, keys.count(), v_cols, queries.count, back);
    }
    if (dk) {
      const Product<M> ds_q = {ds_rows, row, q_columns, q_cols, dk, q_cols, nullptr};
      multiply<M, kStraight, kSum>(ds_q, keys.count(), q_cols, queries.count, back);
    }
    if (to_dq) {
      const Product<M> ds_k = {ds, kQueries, k_columns, q_cols, dq, q_cols, nullptr};
      multiply<M, kTurned, kSum>(ds_k, queries.count, q_cols, keys.count(), band);
    }
  }

  // rows [rows][words] times factor -> out
  static void store(const float* sums, int64_t words, int64_t rows, int64_t cols, float factor,
                    typename Dtype<D>::type* out, int64_t stride) {
    for (int64_t r = 0; r < rows; ++r) {
      for_vectors<V>(cols, [&](auto lanes, int64_t i) {
        lanes.template store<D>(out + r * stride + i, V::template load<PYFT_F32>(sums + r * words + i) * factor);
      });
    }
  }

  // One tile of queries over all its keys; dk and dv begin with the sequence's first key.
  void over_keys(const Queries& queries, float* dk, float* dv) {
    const Sequence& s = queries.sequence;
    load_queries(queries);
    if (b.dq.data) memset(dq, 0, static_cast<size_t>(kQueries * q_words()) * 4);
    for (int64_t tile = first_tile(queries); tile < last_tile(queries); ++tile) {
      const Keys keys = seen_keys(queries, tile);
      load_keys(s, kv_head(queries.head), keys);
      add(queries, keys, b.dq.data, dk ? dk + keys.begin * q_words() : nullptr,
          dv ? dv + keys.begin * v_words() : nullptr);
    }
    if (b.dq.data) {
      auto* out = at<D>(b.dq, s.batch, queries.head, s.q_begin + queries.begin);
      store(dq, q_words(), queries.count, a.dim, a.scale, out, b.dq.seq_stride);
    }
  }

  void store_keys(const Sequence& s, int64_t head, int64_t begin, int64_t count, const float* dk, const float* dv) {
    const int64_t row = s.k_begin + begin;
    if (dk) store(dk, q_words(), count, a.dim, a.scale, at<D>(b.dk, s.batch, head, row), b.dk.seq_stride);
    if (dv) store(dv, v_words(), count, a.v_dim, 1.0f, at<D>(b.dv, s.batch, head, row), b.dv.seq_stride);
  }
};

// dk and dv of `keys` keys, those that are asked for.
struct KeySums {
  template <class Kernel>
  KeySums(const Kernel& kernel, int64_t keys, Arena& arena)
      : dk(kernel.b.dk.data ? arena.words(keys * kernel.q_words()) : nullptr),
        dv(kernel.b.dv.data ? arena.words(keys * kernel.v_words()) : nullptr) {}
  float *dk, *dv;

  template <class Kernel>
  void clear(const Kernel& kernel, int64_t keys) const {
    if (dk) memset(dk, 0, static_cast<size_t>(keys * kernel.q_words()) * 4);
    if (dv) memset(dv, 0, static_cast<size_t>(keys * kernel.v_words()) * 4);
  }
};

template <class M, pyft_dtype D>
struct ByQuery {
  ByQuery(const AttentionCall& call, Arena& arena, int64_t) : tiles(call, arena) {}
  Backward<M, D> tiles;
  void run(const AttentionItem& item) {
    tiles.over_keys(tiles.queries_of(*item.sequence, item.head, item.tile), nullptr, nullptr);
  }
};

template <class M, pyft_dtype D>
struct ByKey {
  ByKey(const AttentionCall& call, Arena& arena, int64_t) : tiles(call, arena), sums(tiles, kKeys, arena) {}
  Backward<M, D> tiles;
  KeySums sums;

  void run(const AttentionItem& item) {
    const Sequence& s = *item.sequence;
    const int64_t first = item.tile * kKeys, group = tiles.a.q_heads / tiles.a.kv_heads;
    const int64_t count = s.keys - first < kKeys ? s.keys - first : kKeys;
    sums.clear(tiles, kKeys);
    for (int64_t head = item.head * group; head < (item.head + 1) * group; ++head) {
      for (int64_t tile = 0; tile * kQueries < s.queries; ++tile) {
        const Queries queries = tiles.queries_of(s, head, tile);
        if (item.tile < first_tile(queries) || item.tile >= last_tile(queries)) continue;
        const Keys keys = seen_keys(queries, item.tile);
        tiles.load_queries(queries);
        tiles.load_keys(s, item.head, keys);
        tiles.add(queries, keys, false, sums.dk ? sums.dk + (keys.begin - first) * tiles.q_words() : nullptr,
                  sums.dv ? sums.dv + (keys.begin - first) * tiles.v_words() : nullptr);
      }
    }
    tiles.store_keys(s, item.head, first, count, sums.dk, sums.dv);
  }
};

template <class M, pyft_dtype D>
struct WholeHead {
  WholeHead(const AttentionCall& call, Arena& arena, int64_t most_keys)
      : tiles(call, arena), sums(tiles, most_keys, arena) {}
  Backward<M, D> tiles;
  KeySums sums;

  void run(const AttentionItem& item) {
    const Sequence& s = *item.sequence;
    const int64_t group = tiles.a.q_heads / tiles.a.kv_heads;
    sums.clear(tiles, s.keys);
    for (int64_t head = item.head * group; head < (item.head + 1) * group; ++head) {
      for (int64_t tile = 0; tile * kQueries < s.queries; ++tile) {
        tiles.over_keys(tiles.queries_of(s, head, tile), sums.dk, sums.dv);
      }
    }
    tiles.store_keys(s, item.head, 0, s.keys, sums.dk, sums.dv);
  }
};

}  // namespace
