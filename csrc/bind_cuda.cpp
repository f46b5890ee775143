// pyft._cuda: the C ABI's CUDA half for Python. Device pointers and the stream are integers; a status that is not OK
// becomes an exception.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "bind.h"

namespace py = pybind11;

namespace {

void check(pyft_status status) {
  if (status == PYFT_CUDA_ERROR) throw std::runtime_error(std::string("CUDA: ") + pyft_cuda_error_string());
  if (status != PYFT_OK) throw py::value_error("a size, dtype or block size is outside its documented range");
}

void quantize(uintptr_t x, int dtype, int64_t n, int64_t block_size, int bits, int zero_code, float top, bool e8m0,
              uintptr_t thresholds, uintptr_t order, uintptr_t packed, uintptr_t scales, uintptr_t zeros,
              uintptr_t stream) {
  const pyft_coding coding = {bits, zero_code, top, e8m0, pointer<float>(thresholds), pointer<uint8_t>(order)};
  check(pyft_cuda_quantize(pointer<void>(x), static_cast<pyft_dtype>(dtype), n, block_size, &coding,
                           pointer<uint8_t>(packed), pointer<void>(scales), pointer<uint8_t>(zeros),
                           pointer<void>(stream)));
}

void dequantize(int bits, uintptr_t packed, uintptr_t scales, uintptr_t zeros, uintptr_t nested, uintptr_t offset,
                uintptr_t codes, uintptr_t scale_codes, int64_t rows, int64_t cols, int64_t block_size,
                int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end, uintptr_t out,
                int64_t out_stride, int dtype, uintptr_t stream) {
  const pyft_weight weight =
      weight_of(bits, packed, scales, zeros, nested, offset, codes, scale_codes, rows, cols, block_size);
  const pyft_slab slab = {row_begin, row_end, col_begin, col_end};
  check(pyft_cuda_dequantize(&weight, &slab, pointer<void>(out), out_stride, static_cast<pyft_dtype>(dtype),
                             pointer<void>(stream)));
}

void qlinear(uintptr_t x, int64_t m, int64_t x_stride, int bits, uintptr_t packed, uintptr_t scales, uintptr_t zeros,
             uintptr_t nested, uintptr_t offset, uintptr_t codes, uintptr_t scale_codes, int64_t rows, int64_t cols,
             int64_t block_size, uintptr_t bias, uintptr_t y, int64_t y_stride, int dtype, uintptr_t stream) {
  const pyft_weight weight =
      weight_of(bits, packed, scales, zeros, nested, offset, codes, scale_codes, rows, cols, block_size);
  check(pyft_cuda_qlinear(pointer<void>(x), m, x_stride, &weight, pointer<void>(bias), pointer<void>(y), y_stride,
                          static_cast<pyft_dtype>(dtype), pointer<void>(stream)));
}

void optim(uintptr_t tensors, int64_t count, int64_t blocks, int dtype, int algorithm, bool nesterov, float sign,
           float beta1, float rest1, float beta2, float rest2, float keep, float decay, float step, float eps,
           uintptr_t codes, uintptr_t starts, int grid, uintptr_t stream) {
  const pyft_optim_rule rule = {
      static_cast<pyft_optimizer>(algorithm), nesterov, sign, beta1, rest1, beta2, rest2, keep, decay, step, eps};
  const pyft_optim_maps maps = {pointer<float>(codes), pointer<uint8_t>(starts)};
  check(pyft_cuda_optim(pointer<pyft_optim_tensor>(tensors), count, blocks, static_cast<pyft_dtype>(dtype), &rule,
                        &maps, grid, pointer<void>(stream)));
}

void attention(const Attention& call, const View& o, uintptr_t lse, int dtype, uintptr_t stream) {
  const pyft_attention attention = attention_of(call);
  const pyft_head_view out = view_of(o);
  check(pyft_cuda_attention(&attention, &out, pointer<float>(lse), static_cast<pyft_dtype>(dtype),
                            pointer<void>(stream)));
}

void attention_delta(const std::array<int64_t, 4>& shape, const View& o, const View& d_o, const View& d_lse,
                     uintptr_t delta, int dtype, uintptr_t stream) {
  const pyft_head_view output = view_of(o), gradient = view_of(d_o);
  check(pyft_cuda_attention_delta(shape[0], shape[1], shape[2], shape[3], &output, &gradient,
                                  pointer<float>(std::get<0>(d_lse)), std::get<1>(d_lse).data(), pointer<float>(delta),
                                  static_cast<pyft_dtype>(dtype), pointer<void>(stream)));
}

void attention_backward(const Attention& call, const Gradients& gradients, uintptr_t lse, uintptr_t delta, int dtype,
                        uintptr_t stream) {
  const pyft_attention attention = attention_of(call);
  const pyft_attention_backward backward = gradients_of(gradients, lse, delta);
  check(pyft_cuda_attention_backward(&attention, &backward, static_cast<pyft_dtype>(dtype), pointer<void>(stream)));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("device_count", &pyft_cuda_device_count, release());
  m.def("quantize", &quantize, release());
  m.def("dequantize", &dequantize, release());
  m.def("qlinear", &qlinear, release());
  m.def("optim", &optim, release());
  m.def("attention", &attention, release());
  m.def("attention_delta", &attention_delta, release());
  m.def("attention_backward", &attention_backward, release());
}
