// What the two Python modules share: addresses as Python has them, put into the structures of pyft.h.
#pragma once

#include <array>
#include <tuple>

#include "pyft.h"

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline pyft_weight weight_of(int bits, uintptr_t packed, uintptr_t scales, uintptr_t zeros, uintptr_t nested,
                             uintptr_t offset, uintptr_t codes, uintptr_t scale_codes, int64_t rows, int64_t cols,
                             int64_t block_size) {
  return {bits,
          pointer<uint8_t>(packed),
          pointer<void>(scales),
          pointer<uint8_t>(zeros),
          pointer<float>(nested),
          pointer<float>(offset),
          pointer<float>(codes),
          pointer<float>(scale_codes),
          rows,
          cols,
          block_size};
}

// Address and distances of batches, heads and tokens.
using View = std::tuple<uintptr_t, std::array<int64_t, 3>>;

inline pyft_head_view view_of(const View& view) {
  const auto& [data, strides] = view;
  return {pointer<void>(data), strides[0], strides[1], strides[2]};
}

// Address, dtype and strides.
using Bias = std::tuple<uintptr_t, int, std::array<int64_t, 4>>;
// Addresses of the lengths of queries and keys, and how many sequences there are.
using Packed = std::tuple<uintptr_t, uintptr_t, int64_t>;
// scale, softcap, left, right, shift, and dropout's seed, threshold and keep.
using Rule = std::tuple<float, float, int64_t, int64_t, int64_t, uint64_t, uint32_t, float>;
// q, k, v; the seven sizes; sinks, slopes.
using Attention = std::tuple<std::array<View, 3>, std::array<int64_t, 7>, uintptr_t, uintptr_t, Bias, Packed, Rule>;

inline pyft_attention attention_of(const Attention& call) {
  const auto& [views, sizes, sinks, slopes, bias, packed, rule] = call;
  pyft_attention attention = {};
  attention.batch = sizes[0], attention.q_heads = sizes[1], attention.kv_heads = sizes[2];
  attention.q_len = sizes[3], attention.k_len = sizes[4], attention.dim = sizes[5], attention.v_dim = sizes[6];
  attention.q = view_of(views[0]), attention.k = view_of(views[1]), attention.v = view_of(views[2]);
  attention.sinks = pointer<float>(sinks), attention.slopes = pointer<float>(slopes);
  attention.bias = pointer<void>(std::get<0>(bias));
  attention.bias_dtype = static_cast<pyft_dtype>(std::get<1>(bias));
  for (size_t i = 0; i < 4; ++i) attention.bias_strides[i] = std::get<2>(bias)[i];
  attention.cu_seqlens_q = pointer<int32_t>(std::get<0>(packed));
  attention.cu_seqlens_k = pointer<int32_t>(std::get<1>(packed));
  attention.sequences = std::get<2>(packed);
  std::tie(attention.scale, attention.softcap, attention.left, attention.right, attention.shift, attention.seed,
           attention.threshold, attention.keep) = rule;
  return attention;
}

// d_o, dq, dk, dv.
using Gradients = std::array<View, 4>;

inline pyft_attention_backward gradients_of(const Gradients& views, uintptr_t lse, uintptr_t delta) {
  return {view_of(views[0]), pointer<float>(lse), pointer<float>(delta),
          view_of(views[1]), view_of(views[2]),   view_of(views[3])};
}

}  // namespace
