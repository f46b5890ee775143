// o and lse of a tile of queries, over their keys tile by tile with a running maximum and sum.
#pragma once

#include <math.h>

#include "attention_scores.h"

namespace {

template <class M, pyft_dtype D>
struct Forward {
  using V = typename M::V;
  using Floats = typename V::Floats;

  Forward(const AttentionCall& call, Arena& arena, int64_t)
      : call(call),
        a(call.attention),
        scores(a, arena, false),
        q(arena.words(row_words<M>(a.dim) * kQueries)),
        rows(arena.words(row_words<M>(a.dim) * kKeys)),
        v(arena.words(column_words<M>(a.v_dim) * kKeys / M::kPairs)),
        p(arena.words(kKeys * kQueries)),
        o(arena.words(column_words<M>(a.v_dim) * kQueries)),
        most(arena.words(kQueries)),
        total(arena.words(kQueries)),
        factor(arena.words(kQueries)) {}

  const AttentionCall& call;
  const pyft_attention& a;
  Scores<M> scores;
  float* q;             // turned: words [dim][kQueries]
  float* rows;          // words [kKeys][dim]: k, and q before it is turned
  float* v;             // words [kKeys / kPairs][v_dim]
  float* p;             // products, scores, P: [kKeys][kQueries], at last words [kKeys / kPairs][kQueries]
  float* o;             // fp32 [kQueries][v_dim]
  float *most, *total;  // of each query: the largest score, the sum of e^(score - most)
  float* factor;        // what o is still to be multiplied with, as the largest score has grown

  void run(const AttentionItem& item) {
    const Sequence& s = *item.sequence;
    const int64_t begin = item.tile * kQueries, rest = s.queries - begin, count = rest < kQueries ? rest : kQueries;
    const Queries queries = {s, item.head, begin, count};
    const float sink = a.sinks ? a.sinks[item.head] : -__builtin_inff();
    const int64_t kv_head = item.head / (a.q_heads / a.kv_heads), o_width = column_words<M>(a.v_dim);
    for (int64_t i = 0; i < kQueries; ++i) {
      most[i] = sink;
      total[i] = sink == -__builtin_inff() ? 0.0f : 1.0f;
    }
    memset(o, 0, static_cast<size_t>(kQueries * o_width) * 4);
    load_rows<M, D>(at<D>(a.q, s.batch, item.head, s.q_begin + begin), a.q.seq_stride, count, a.dim, V::kLanes, rows);
    turn(rows, round_up(count, V::kLanes), row_words<M>(a.dim), q);
    for (int64_t tile = first_tile(queries); tile < last_tile(queries); ++tile) {
      const Keys keys = seen_keys(queries, tile);
      const int64_t row = s.k_begin + keys.begin;
      load_rows<M, D>(at<D>(a.k, s.batch, kv_head, row), a.k.seq_stride, keys.count(), a.dim, kStep, rows);
      load_columns<M, D>(at<D>(a.v, s.batch, kv_head, row), a.v.seq_stride, keys.count(), a.v_dim, kStep, v);
      add(queries, keys);
    }
    for (int64_t i = 0; i < count; ++i) {
      store(o + i * o_width, total[i], at<D>(*call.o, s.batch, item.head, s.q_begin + begin + i));
      const bool nothing = total[i] == 1.0f && most[i] == sink;  // but the sink
      const double lse = most[i] + log(static_cast<double>(total[i]));
      call.lse[(s.batch * a.q_heads + item.head) * a.q_len + s.q_begin + begin + i] =
          nothing ? sink : static_cast<float>(lse);
    }
  }

 private:
  void add(const Queries& queries, const Keys& keys) {
    const int64_t cols = round_up(queries.count, V::kLanes), count = round_up(keys.count(), kStep);
    const Product<M> qk = {rows, row_words<M>(a.dim), q, kQueries, p, kQueries, nullptr};
    multiply<M, kStraight, kNothing>(qk, count, cols, a.dim);
    const float scale = scores.prepare(p, queries, keys);
    if (scores.kept) scores.fill_kept(queries, keys);
    for (int64_t i = 0; i < cols; i += V::kLanes) exponentials(i, count, scale);
    const Product<M> pv = {p, kQueries, v, column_words<M>(a.v_dim), o, column_words<M>(a.v_dim), factor};
    multiply<M, kTurned, kScaled>(pv, queries.count, column_words<M>(a.v_dim), keys.count(), band_of(queries, keys));
  }

  // A vector of queries: the new maximum, P, its sum, and what o so far is to be multiplied with.
  void exponentials(int64_t i, int64_t count, float scale) {
    const Floats before = V::template load<PYFT_F32>(most + i);
    Floats top[kStep] = {before, before, before, before};
    for (int64_t j = 0; j < count; j += kStep) {
      for (int r = 0; r < kStep; ++r) {
        top[r] = V::max(V::template load<PYFT_F32>(p + (j + r) * kQueries + i) * scale, top[r]);
      }
    }
    const Floats now = V::max(V::max(top[0], top[1]), V::max(top[2], top[3]));
    const Floats base = now == -__builtin_inff() ? Floats{} : now;
    Floats sums[kStep] = {};
    for (int64_t j = 0; j < count; j += kStep) {
      Floats x[kStep];
      for (int r = 0; r < kStep; ++r) {
        const int64_t where = (j + r) * kQueries + i;
        x[r] = exp2<V, D>(V::fma(V::template load<PYFT_F32>(p + where), V::splat(scale), -base) * kLog2E);
        sums[r] += x[r];
        if (scores.kept) x[r] *= V::template load<PYFT_F32>(scores.kept + where);
      }
      for (int r = 0; r < kStep; r += M::kPairs) M::store_column(p + (j + r) / M::kPairs * kQueries, i, x + r);
    }
    const Floats shrink = exp2<V, D>((before - base) * kLog2E);
    const Floats sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    V::template store<PYFT_F32>(most + i, now);
    V::template store<PYFT_F32>(factor + i, shrink);
    V::template store<PYFT_F32>(total + i, V::fma(V::template load<PYFT_F32>(total + i), shrink, sum));
  }

  void store(const float* row, float sum, typename Dtype<D>::type* out) {
    for_vectors<V>(a.v_dim, [&](auto lanes, int64_t i) {
      const Floats x = V::template load<PYFT_F32>(row + i);
      lanes.template store<D>(out + i, sum == 0.0f ? Floats{} : x / sum);
    });
  }
};

}  // namespace
