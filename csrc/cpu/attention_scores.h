// What becomes of the products q·k of a tile before their exponential: scale, cap, bias, distance, mask; and the words
// of dropout. Everything here is [keys][kQueries] fp32.
#pragma once

#include "attention.h"
#include "attention_matmul.h"
#include "philox.h"

namespace {

constexpr int kStep = 4;  // what the number of keys of a tile is filled up to
constexpr float kLog2E = 1.44269504f;

template <pyft_dtype D, class View>
auto* at(const View& view, int64_t batch, int64_t head, int64_t row) {
  return static_cast<typename Dtype<D>::type*>(view.data) + batch * view.batch_stride + head * view.head_stride +
         row * view.seq_stride;
}

// Queries [begin, begin + count) of a sequence and a head of them.
struct Queries {
  const Sequence& sequence;
  int64_t head, begin, count;
  // The sequence's keys that any of them sees, from a multiple of 4, which pairs and the words of dropout ask for.
  int64_t first_key() const { return begin + sequence.low > 0 ? (begin + sequence.low) / 4 * 4 : 0; }
  int64_t last_key() const {
    const int64_t last = begin + count + sequence.high;
    return last < sequence.keys ? last : sequence.keys;
  }
};

// Of a tile of keys what the queries see.
struct Keys {
  int64_t begin, end;
  int64_t count() const { return end - begin; }
};
inline Keys seen_keys(const Queries& queries, int64_t tile) {
  const int64_t begin = tile * kKeys, end = begin + kKeys, first = queries.first_key(), last = queries.last_key();
  return {begin < first ? first : begin, end > last ? last : end};
}

// Tiles of keys that some of the queries see: [first, last).
inline int64_t first_tile(const Queries& queries) { return queries.first_key() / kKeys; }
inline int64_t last_tile(const Queries& queries) {
  return queries.first_key() < queries.last_key() ? tiles_of(queries.last_key(), kKeys) : 0;
}

inline int64_t clamp_band(int64_t x) { return x < kAll.low ? kAll.low : x > kAll.high ? kAll.high : x; }

// Which keys of `keys` a query of `queries` sees, both counted from their first.
inline Band band_of(const Queries& queries, const Keys& keys) {
  const int64_t shift = queries.begin - keys.begin;
  return {clamp_band(queries.sequence.low + shift), clamp_band(queries.sequence.high + shift)};
}

// The tiles a call needs beside the products: none for plain attention.
template <class M>
struct Scores {
  using V = typename M::V;
  using Floats = typename V::Floats;

  Scores(const pyft_attention& attention, Arena& arena, bool backward)
      : attention(attention),
        bias(attention.bias ? arena.words(kKeys * kQueries) : nullptr),
        bias_rows(attention.bias ? arena.words(kKeys * kQueries) : nullptr),
        kept(attention.threshold ? arena.words(kKeys * kQueries) : nullptr),
        slope(backward && attention.softcap != 0.0f ? arena.words(kKeys * kQueries) : nullptr) {}

  const pyft_attention& attention;
  float* bias;       // of each score
  float* bias_rows;  // [kQueries][kKeys]
  float* kept;       // what dropout multiplies each P with
  float* slope;      // the derivative of the cap

  // Products -> scores, where they have to be changed; returns what is still to be multiplied with.
  float prepare(float* scores, const Queries& queries, const Keys& keys) const {
    const Band band = band_of(queries, keys);
    const int64_t rows = round_up(keys.count(), kStep), cols = round_up(queries.count, V::kLanes);
    const bool all = band.low <= 1 - queries.count && band.high >= keys.count() - 1 && rows == keys.count();
    const bool plain = !bias && !attention.slopes && attention.softcap == 0.0f;
    if (plain && all) return attention.scale;
    if (bias) fill_bias(queries, keys, rows, cols);
    const float cap = attention.softcap, distance_factor = alibi(queries);
    const float ahead = static_cast<float>(queries.begin + queries.sequence.offset - keys.begin);
    alignas(64) float lanes[kQueries];
    for (int64_t i = 0; i < kQueries; ++i) lanes[i] = static_cast<float>(i);
    for (int64_t i = 0; i < cols; i += V::kLanes) {
      const Floats query = V::template load<PYFT_F32>(lanes + i);
      const Floats low = query + static_cast<float>(band.low), high = query + static_cast<float>(band.high);
      for (int64_t j = 0; j < rows; ++j) {
        const Floats key = V::splat(static_cast<float>(j));
        Floats x = V::template load<PYFT_F32>(scores + j * kQueries + i) * attention.scale;
        if (!plain) {
          if (cap != 0.0f) x = capped(x, cap, j * kQueries + i);
          if (bias) x += V::template load<PYFT_F32>(bias + j * kQueries + i);
          if (attention.slopes) {
            const Floats distance = query + (ahead - key);
            x -= distance_factor * (distance < 0.0f ? -distance : distance);
          }
        }
        if (!all) {
          const Floats nothing = V::splat(-__builtin_inff());
          x = j < keys.count() ? x : nothing;
          x = key < low ? nothing : key > high ? nothing : x;
        }
        V::template store<PYFT_F32>(scores + j * kQueries + i, x);
      }
    }
    return 1.0f;
  }

  // The words of dropout: query token i of the row and key j have word ((b heads + h) q_len + i) pitch + j.
  void fill_kept(const Queries& queries, const Keys& keys) const {
    const uint64_t pitch = static_cast<uint64_t>(round_up(attention.k_len, 4));
    const int64_t row = (queries.sequence.batch * attention.q_heads + queries.head) * attention.q_len +
                        queries.sequence.q_begin + queries.begin;
    for (int64_t i = 0; i < round_up(queries.count, V::kLanes); i += V::kLanes) {
      for (int64_t j = 0; j < keys.count(); j += 4) {
        const uint64_t first = (static_cast<uint64_t>(row + i) * pitch + static_cast<uint64_t>(keys.begin + j)) / 4;
        uint32_t words[4][V::kLanes];
        philox_lanes<V>(first, pitch / 4, attention.seed, words);
        for (int w = 0; w < 4; ++w) {
          float lanes[V::kLanes];
          for (int n = 0; n < V::kLanes; ++n) lanes[n] = words[w][n] >= attention.threshold ? attention.keep : 0.0f;
          V::template store<PYFT_F32>(kept + (j + w) * kQueries + i, V::template load<PYFT_F32>(lanes));
        }
      }
    }
  }

 private:
  float alibi(const Queries& queries) const {
    if (!attention.slopes) return 0.0f;
    return attention.slopes[queries.sequence.batch * attention.q_heads + queries.head];
  }

  Floats capped(Floats x, float cap, int64_t where) const {
    const Floats share = tanh<V>(x / cap);
    if (slope) V::template store<PYFT_F32>(slope + where, 1.0f - share * share);
    return share * cap;
  }

  void fill_bias(const Queries& queries, const Keys& keys, int64_t rows, int64_t cols) const {
    if (attention.bias_dtype == PYFT_F32) return fill_bias_of<PYFT_F32>(queries, keys, rows, cols);
    if (attention.bias_dtype == PYFT_F16) return fill_bias_of<PYFT_F16>(queries, keys, rows, cols);
    fill_bias_of<PYFT_BF16>(queries, keys, rows, cols);
  }

  // Zeros where there is no query or no key.
  template <pyft_dtype D>
  void fill_bias_of(const Queries& queries, const Keys& keys, int64_t rows, int64_t cols) const {
    const int64_t* strides = attention.bias_strides;
    const auto* first = static_cast<const typename Dtype<D>::type*>(attention.bias) +
                        queries.sequence.batch * strides[0] + queries.head * strides[1] + queries.begin * strides[2] +
                        keys.begin * strides[3];
    if (strides[3] == 1) {
      load_rows<Singles<V>, D>(first, strides[2], queries.count, keys.count(), V::kLanes, bias_rows);
      return turn(bias_rows, cols, row_words<Singles<V>>(keys.count()), bias);
    }
    for (int64_t j = 0; j < rows; ++j) {
      float* out = bias + j * kQueries;
      for (int64_t i = 0; i < cols; ++i) {
        const bool there = j < keys.count() && i < queries.count;
        out[i] = there ? Dtype<D>::load(first[i * strides[2] + j * strides[3]]) : 0.0f;
      }
    }
  }
};

}  // namespace
