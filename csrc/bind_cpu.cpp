// pyft._cpu: the C ABI's CPU half for Python. Pointers are integers; a status that is not OK becomes an exception.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>

#include "bind.h"

namespace py = pybind11;

namespace {

void check(pyft_status status) {
  if (status == PYFT_BAD_ISA) throw py::value_error("this instruction set is not available on this CPU");
  if (status != PYFT_OK) throw py::value_error("a size, dtype or block size is outside its documented range");
}

void quantize(uintptr_t x, int dtype, int64_t n, int64_t block_size, int bits, int zero_code, float top, bool e8m0,
              uintptr_t thresholds, uintptr_t order, uintptr_t packed, uintptr_t scales, uintptr_t zeros, int isa,
              int threads) {
  const pyft_coding coding = {bits, zero_code, top, e8m0, pointer<float>(thresholds), pointer<uint8_t>(order)};
  check(pyft_cpu_quantize(pointer<void>(x), static_cast<pyft_dtype>(dtype), n, block_size, &coding,
                          pointer<uint8_t>(packed), pointer<void>(scales), pointer<uint8_t>(zeros),
                          static_cast<pyft_isa>(isa), threads));
}

void dequantize(int bits, uintptr_t packed, uintptr_t scales, uintptr_t zeros, uintptr_t nested, uintptr_t offset,
                uintptr_t codes, uintptr_t scale_codes, int64_t rows, int64_t cols, int64_t block_size,
                int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end, uintptr_t out,
                int64_t out_stride, int dtype, int isa, int threads) {
  const pyft_weight weight =
      weight_of(bits, packed, scales, zeros, nested, offset, codes, scale_codes, rows, cols, block_size);
  const pyft_slab slab = {row_begin, row_end, col_begin, col_end};
  check(pyft_cpu_dequantize(&weight, &slab, pointer<void>(out), out_stride, static_cast<pyft_dtype>(dtype),
                            static_cast<pyft_isa>(isa), threads));
}

void qlinear(uintptr_t x, int64_t m, int64_t x_stride, int bits, uintptr_t packed, uintptr_t scales, uintptr_t zeros,
             uintptr_t nested, uintptr_t offset, uintptr_t codes, uintptr_t scale_codes, int64_t rows, int64_t cols,
             int64_t block_size, uintptr_t bias, uintptr_t y, int64_t y_stride, int dtype, int isa, int threads) {
  const pyft_weight weight =
      weight_of(bits, packed, scales, zeros, nested, offset, codes, scale_codes, rows, cols, block_size);
  check(pyft_cpu_qlinear(pointer<void>(x), m, x_stride, &weight, pointer<void>(bias), pointer<void>(y), y_stride,
                         static_cast<pyft_dtype>(dtype), static_cast<pyft_isa>(isa), threads));
}

void dropout(uintptr_t x, int dtype, int64_t n, uint64_t seed, uint32_t threshold, float scale, uintptr_t out,
             int threads) {
  check(pyft_cpu_dropout(pointer<void>(x), static_cast<pyft_dtype>(dtype), n, seed, threshold, scale,
                         pointer<void>(out), threads));
}

void optim(uintptr_t tensors, int64_t count, int dtype, int algorithm, bool nesterov, float sign, float beta1,
           float rest1, float beta2, float rest2, float keep, float decay, float step, float eps, uintptr_t codes,
           uintptr_t starts, int isa, int threads) {
  const pyft_optim_rule rule = {
      static_cast<pyft_optimizer>(algorithm), nesterov, sign, beta1, rest1, beta2, rest2, keep, decay, step, eps};
  const pyft_optim_maps maps = {pointer<float>(codes), pointer<uint8_t>(starts)};
  check(pyft_cpu_optim(pointer<pyft_optim_tensor>(tensors), count, static_cast<pyft_dtype>(dtype), &rule, &maps,
                       static_cast<pyft_isa>(isa), threads));
}

// A matrix or a vector as Python has it: address and distance of rows.
using Rows = std::pair<uintptr_t, int64_t>;

void norm(Rows x, Rows residual, uintptr_t weight, uintptr_t bias, float eps, float offset, Rows y, Rows h,
          uintptr_t mean, uintptr_t rstd, int64_t rows, int64_t cols, int dtype, int isa, int threads) {
  pyft_norm norm = {};
  norm.rows = rows, norm.cols = cols;
  norm.x = pointer<void>(x.first), norm.x_stride = x.second;
  norm.residual = pointer<void>(residual.first), norm.residual_stride = residual.second;
  norm.weight = pointer<void>(weight), norm.bias = pointer<void>(bias);
  norm.y = pointer<void>(y.first), norm.y_stride = y.second;
  norm.h = pointer<void>(h.first), norm.h_stride = h.second;
  norm.mean = pointer<float>(mean), norm.rstd = pointer<float>(rstd);
  norm.eps = eps, norm.offset = offset;
  check(pyft_cpu_norm(&norm, static_cast<pyft_dtype>(dtype), static_cast<pyft_isa>(isa), threads));
}

void norm_backward(Rows dy, Rows h, uintptr_t weight, uintptr_t mean, uintptr_t rstd, float offset, Rows dh, Rows dx,
                   uintptr_t dweight, uintptr_t dbias, int64_t rows, int64_t cols, int64_t parts, int dtype, int isa,
                   int threads) {
  pyft_norm_backward norm = {};
  norm.rows = rows, norm.cols = cols, norm.parts = parts;
  norm.dy = pointer<void>(dy.first), norm.dy_stride = dy.second;
  norm.h = pointer<void>(h.first), norm.h_stride = h.second;
  norm.dh = pointer<void>(dh.first), norm.dh_stride = dh.second;
  norm.dx = pointer<void>(dx.first), norm.dx_stride = dx.second;
  norm.weight = pointer<void>(weight), norm.mean = pointer<float>(mean), norm.rstd = pointer<float>(rstd);
  norm.dweight = pointer<float>(dweight), norm.dbias = pointer<float>(dbias);
  norm.offset = offset;
  check(pyft_cpu_norm_backward(&norm, static_cast<pyft_dtype>(dtype), static_cast<pyft_isa>(isa), threads));
}

// Addresses of x and out, their heads, and the distances of batches, heads and tokens.
using Heads = std::tuple<uintptr_t, uintptr_t, int64_t, std::array<int64_t, 3>, std::array<int64_t, 3>>;

pyft_heads heads_of(const Heads& heads) {
  const auto& [x, out, count, from, to] = heads;
  return {pointer<void>(x), pointer<void>(out), count, from[0], from[1], from[2], to[0], to[1], to[2]};
}

// Address and distances of batches and rows.
using Table = std::tuple<uintptr_t, int64_t, int64_t>;

void rope(const Heads& q, const Heads& k, Table cos, Table sin, Table positions, bool interleaved, bool inverse,
          int64_t batch, int64_t seq, int64_t dim, int64_t half, int table_dtype, int dtype, int isa, int threads) {
  pyft_rope rope = {};
  rope.batch = batch, rope.seq = seq, rope.dim = dim, rope.half = half;
  rope.cos = pointer<void>(std::get<0>(cos)), rope.cos_batch = std::get<1>(cos), rope.cos_row = std::get<2>(cos);
  rope.sin = pointer<void>(std::get<0>(sin)), rope.sin_batch = std::get<1>(sin), rope.sin_row = std::get<2>(sin);
  rope.positions = pointer<int64_t>(std::get<0>(positions));
  rope.positions_batch = std::get<1>(positions), rope.positions_seq = std::get<2>(positions);
  rope.table_dtype = static_cast<pyft_dtype>(table_dtype);
  rope.interleaved = interleaved, rope.inverse = inverse;
  const pyft_heads queries = heads_of(q), keys = heads_of(k);
  check(pyft_cpu_rope(&rope, &queries, keys.x ? &keys : nullptr, static_cast<pyft_dtype>(dtype),
                      static_cast<pyft_isa>(isa), threads));
}

void glu(Rows gate, Rows up, int activation, Rows out, int64_t rows, int64_t cols, int dtype, int isa, int threads) {
  const pyft_glu glu = {rows,
                        cols,
                        static_cast<pyft_activation>(activation),
                        pointer<void>(gate.first),
                        pointer<void>(up.first),
                        pointer<void>(out.first),
                        gate.second,
                        up.second,
                        out.second};
  check(pyft_cpu_glu(&glu, static_cast<pyft_dtype>(dtype), static_cast<pyft_isa>(isa), threads));
}

void glu_backward(Rows dy, Rows gate, Rows up, int activation, Rows dgate, Rows dup, Rows out, int64_t rows,
                  int64_t cols, int dtype, int isa, int threads) {
  const pyft_glu_backward glu = {rows,
                                 cols,
                                 static_cast<pyft_activation>(activation),
                                 pointer<void>(dy.first),
                                 pointer<void>(gate.first),
                                 pointer<void>(up.first),
                                 pointer<void>(dgate.first),
                                 pointer<void>(dup.first),
                                 pointer<void>(out.first),
                                 dy.second,
                                 gate.second,
                                 up.second,
                                 dgate.second,
                                 dup.second,
                                 out.second};
  check(pyft_cpu_glu_backward(&glu, static_cast<pyft_dtype>(dtype), static_cast<pyft_isa>(isa), threads));
}

void attention(const Attention& call, const View& o, uintptr_t lse, int dtype, int isa, int threads) {
  const pyft_attention attention = attention_of(call);
  const pyft_head_view out = view_of(o);
  check(pyft_cpu_attention(&attention, &out, pointer<float>(lse), static_cast<pyft_dtype>(dtype),
                           static_cast<pyft_isa>(isa), threads));
}

void attention_delta(const std::array<int64_t, 4>& shape, const View& o, const View& d_o, const View& d_lse,
                     uintptr_t delta, int dtype, int isa, int threads) {
  const pyft_head_view output = view_of(o), gradient = view_of(d_o);
  check(pyft_cpu_attention_delta(shape[0], shape[1], shape[2], shape[3], &output, &gradient,
                                 pointer<float>(std::get<0>(d_lse)), std::get<1>(d_lse).data(), pointer<float>(delta),
                                 static_cast<pyft_dtype>(dtype), static_cast<pyft_isa>(isa), threads));
}

void attention_backward(const Attention& call, const Gradients& gradients, uintptr_t lse, uintptr_t delta, int dtype,
                        int isa, int threads) {
  const pyft_attention attention = attention_of(call);
  const pyft_attention_backward backward = gradients_of(gradients, lse, delta);
  check(pyft_cpu_attention_backward(&attention, &backward, static_cast<pyft_dtype>(dtype), static_cast<pyft_isa>(isa),
                                    threads));
}

void attention_bias_backward(const Attention& call, const Gradients& gradients, uintptr_t lse, uintptr_t delta,
                             uintptr_t d_bias, int dtype, int isa, int threads) {
  const pyft_attention attention = attention_of(call);
  const pyft_attention_backward backward = gradients_of(gradients, lse, delta);
  check(pyft_cpu_attention_bias_backward(&attention, &backward, pointer<void>(d_bias), static_cast<pyft_dtype>(dtype),
                                         static_cast<pyft_isa>(isa), threads));
}

// Address, distance of rows, scale and softcap.
using LogitView = std::tuple<uintptr_t, int64_t, float, float>;
// rows, cols, logits, labels, class weights, the teacher's logits and lse.
using Logits = std::tuple<int64_t, int64_t, LogitView, uintptr_t, uintptr_t, LogitView, uintptr_t>;

pyft_logit_view view_of(const LogitView& view) {
  const auto& [data, stride, scale, softcap] = view;
  return {pointer<void>(data), stride, scale, softcap};
}

pyft_logits logits_of(const Logits& call) {
  const auto& [rows, cols, logits, labels, class_weights, teacher, teacher_lse] = call;
  return {rows,
          cols,
          view_of(logits),
          pointer<int64_t>(labels),
          pointer<float>(class_weights),
          view_of(teacher),
          pointer<float>(teacher_lse)};
}

void logit_statistics(const Logits& call, const std::array<uintptr_t, 6>& sums, uintptr_t argmax, int dtype, int isa,
                      int threads) {
  const pyft_logits logits = logits_of(call);
  const pyft_logit_statistics statistics = {pointer<float>(sums[0]), pointer<float>(sums[1]), pointer<float>(sums[2]),
                                            pointer<float>(sums[3]), pointer<float>(sums[4]), pointer<float>(sums[5]),
                                            pointer<int64_t>(argmax)};
  check(pyft_cpu_logit_statistics(&logits, &statistics, static_cast<pyft_dtype>(dtype), static_cast<pyft_isa>(isa),
                                  threads));
}

void logit_gradient(const Logits& call, const std::array<uintptr_t, 7>& sums, float threshold, uintptr_t kept,
                    int dtype, int isa, int threads) {
  const pyft_logits logits = logits_of(call);
  const pyft_logit_gradient gradient = {
      pointer<float>(sums[0]), pointer<float>(sums[1]), pointer<float>(sums[2]), pointer<float>(sums[3]),
      pointer<float>(sums[4]), pointer<float>(sums[5]), pointer<float>(sums[6]), threshold,
      pointer<uint8_t>(kept)};
  check(
      pyft_cpu_logit_gradient(&logits, &gradient, static_cast<pyft_dtype>(dtype), static_cast<pyft_isa>(isa), threads));
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("best_isa", [] { return static_cast<int>(pyft_cpu_best_isa()); });
  m.def(
      "use_huge_pages",
      [](uintptr_t memory, int64_t bytes) { check(pyft_cpu_use_huge_pages(pointer<void>(memory), bytes)); }, release());
  m.def("quantize", &quantize, release());
  m.def("dequantize", &dequantize, release());
  m.def("qlinear", &qlinear, release());
  m.def("dropout", &dropout, release());
  m.def("optim", &optim, release());
  m.def("norm", &norm, release());
  m.def("norm_backward", &norm_backward, release());
  m.def("rope", &rope, release());
  m.def("glu", &glu, release());
  m.def("glu_backward", &glu_backward, release());
  m.def("logit_statistics", &logit_statistics, release());
  m.def("logit_gradient", &logit_gradient, release());
  m.def("attention", &attention, release());
  m.def("attention_delta", &attention_delta, release());
  m.def("attention_backward", &attention_backward, release());
  m.def("attention_bias_backward", &attention_bias_backward, release());
}
