// Rotary embedding of heads, with the arithmetic of pyft/reference/rope.py in fp32. The cosines and sines of a few
// tokens are converted once and serve all their heads.
#pragma once

#include "vectors.h"

// One table per instruction set, indexed by pyft_dtype: tokens [begin, end) of batch * seq; k may be NULL.
struct RopeKernels {
  void (*turn[3])(const pyft_rope& rope, const pyft_heads& q, const pyft_heads* k, int64_t begin, int64_t end);
};

extern const RopeKernels rope_scalar;
#ifdef PYFT_X86
extern const RopeKernels rope_avx2;
extern const RopeKernels rope_avx512;
extern const RopeKernels rope_avx512bf16;
#endif

namespace {

constexpr int64_t kPairs = 64, kTokens = 8;  // that are turned together

// The factors of kPairs pairs of one token. Interleaved, those of each of their elements: the sines are negative at the
// first of a pair, whose partner they multiply.
struct Angles {
  alignas(64) float cos[2 * kPairs], sin[2 * kPairs];
};

struct Token {
  int64_t b, s;
};

template <class V, pyft_dtype D>
void load_angles(const pyft_rope& rope, Token token, int64_t first, int64_t pairs, Angles& angles) {
  int64_t row = token.s, b = token.b;
  if (rope.positions) {
    row = rope.positions[b * rope.positions_batch + row * rope.positions_seq];
    b = 0;
  }
  const auto* cos = row_of<D>(rope.cos, b, rope.cos_batch) + row * rope.cos_row + first;
  const auto* sin = row_of<D>(rope.sin, b, rope.sin_batch) + row * rope.sin_row + first;
  const float sign = rope.inverse ? -1.0f : 1.0f;
  for_vectors<V>(pairs, [&](auto lanes, int64_t i) {
    lanes.template store<PYFT_F32>(angles.cos + i, lanes.template load<D>(cos + i));
    lanes.template store<PYFT_F32>(angles.sin + i, lanes.template load<D>(sin + i) * sign);
  });
  if (!rope.interleaved) return;
  for (int64_t i = pairs - 1; i >= 0; --i) {
    angles.cos[2 * i + 1] = angles.cos[2 * i] = angles.cos[i];
    angles.sin[2 * i + 1] = angles.sin[i];
    angles.sin[2 * i] = -angles.sin[i];
  }
}

// Elements i and i + half are a pair. Both are read before one is written: x may be out.
template <class V, pyft_dtype D, class T>
void turn_halves(const T* x, T* out, int64_t half, int64_t pairs, const Angles& angles) {
  for_vectors<V>(pairs, [&](auto lanes, int64_t i) {
    const auto a = lanes.template load<D>(x + i), b = lanes.template load<D>(x + half + i);
    const auto c = lanes.template load<PYFT_F32>(angles.cos + i), s = lanes.template load<PYFT_F32>(angles.sin + i);
    lanes.template store<D>(out + i, a * c - b * s);
    lanes.template store<D>(out + half + i, b * c + a * s);
  });
}

template <class V, pyft_dtype D, class T>
void turn_interleaved(const T* x, T* out, int64_t pairs, const Angles& angles) {
  for_vectors<V>(2 * pairs, [&](auto lanes, int64_t i) {
    const auto a = lanes.template load<D>(x + i);
    const auto c = lanes.template load<PYFT_F32>(angles.cos + i), s = lanes.template load<PYFT_F32>(angles.sin + i);
    lanes.template store<D>(out + i, a * c + V::swap_pairs(a) * s);
  });
}

template <class V, pyft_dtype D>
void turn_heads(const pyft_rope& rope, const pyft_heads& heads, const Token* tokens, int64_t count, int64_t first,
                int64_t pairs, const Angles* angles) {
  using T = typename Dtype<D>::type;
  const int64_t rest = rope.dim - 2 * rope.half;
  for (int64_t h = 0; h < heads.heads; ++h) {
    for (int64_t t = 0; t < count; ++t) {
      const Token at = tokens[t];
      const T* x = static_cast<const T*>(heads.x) + at.b * heads.x_batch + h * heads.x_head + at.s * heads.x_seq;
      T* out = static_cast<T*>(heads.out) + at.b * heads.out_batch + h * heads.out_head + at.s * heads.out_seq;
      if (rope.interleaved) {
        turn_interleaved<V, D>(x + 2 * first, out + 2 * first, pairs, angles[t]);
      } else {
        turn_halves<V, D>(x + first, out + first, rope.half, pairs, angles[t]);
      }
      if (first + pairs == rope.half && rest && x != out) {
        memcpy(out + 2 * rope.half, x + 2 * rope.half, static_cast<size_t>(rest) * sizeof(T));
      }
    }
  }
}

template <class V, pyft_dtype D>
void rope_tokens(const pyft_rope& rope, const pyft_heads& q, const pyft_heads* k, int64_t begin, int64_t end) {
  // Rows that are neighbours in memory are turned one after the other: those of a head, or those of a token.
  const int64_t together = q.x_seq < q.x_head ? kTokens : 1;
  Angles angles[kTokens];
  Token tokens[kTokens];
  for (int64_t at = begin; at < end; at += together) {
    const int64_t count = end - at < together ? end - at : together;
    for (int64_t t = 0; t < count; ++t) tokens[t] = {(at + t) / rope.seq, (at + t) % rope.seq};
    int64_t first = 0;
    do {
      const int64_t pairs = rope.half - first < kPairs ? rope.half - first : kPairs;
      for (int64_t t = 0; t < count; ++t) {
        if (rope.table_dtype == D) {
          load_angles<V, D>(rope, tokens[t], first, pairs, angles[t]);
        } else {
          load_angles<V, PYFT_F32>(rope, tokens[t], first, pairs, angles[t]);
        }
      }
      turn_heads<V, D>(rope, q, tokens, count, first, pairs, angles);
      if (k) turn_heads<V, D>(rope, *k, tokens, count, first, pairs, angles);
      first += kPairs;
    } while (first < rope.half);
  }
}

template <class V>
constexpr RopeKernels rope_kernels = {{rope_tokens<V, PYFT_F32>, rope_tokens<V, PYFT_F16>, rope_tokens<V, PYFT_BF16>}};

}  // namespace
