// pyft._cpu: the C ABI's CPU half for Python. Pointers are integers; a status that is not OK becomes an exception.
#include <pybind11/pybind11.h>

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
}
