// pyft._cpu: the C ABI's CPU half for Python. Pointers are integers; a status that is not OK becomes an exception.
#include <pybind11/pybind11.h>

#include "pyft.h"

namespace py = pybind11;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void check(pyft_status status) {
  if (status == PYFT_BAD_ISA) throw py::value_error("this instruction set is not available on this CPU");
  if (status != PYFT_OK) throw py::value_error("a size, dtype or block size is outside its documented range");
}

void quantize4(uintptr_t x, int dtype, int64_t n, int64_t block_size, uintptr_t midpoints, int zero_code,
               uintptr_t packed, uintptr_t absmax, int isa, int threads) {
  check(pyft_cpu_quantize4(pointer<void>(x), static_cast<pyft_dtype>(dtype), n, block_size, pointer<float>(midpoints),
                           zero_code, pointer<uint8_t>(packed), pointer<float>(absmax), static_cast<pyft_isa>(isa),
                           threads));
}

void quantize_absmax(uintptr_t x, int64_t n, uintptr_t offset, uintptr_t midpoints, int zero_code, uintptr_t codes,
                     uintptr_t absmax) {
  check(pyft_cpu_quantize_absmax(pointer<float>(x), n, pointer<float>(offset), pointer<float>(midpoints), zero_code,
                                 pointer<uint8_t>(codes), pointer<float>(absmax)));
}

void dequantize4(uintptr_t packed, uintptr_t absmax, uintptr_t nested, uintptr_t offset, uintptr_t codes,
                 uintptr_t absmax_codes, int64_t rows, int64_t cols, int64_t block_size, int64_t row_begin,
                 int64_t row_end, uintptr_t out, int64_t out_stride, int dtype, int isa, int threads) {
  const pyft_weight4 weight = {pointer<uint8_t>(packed),
                               pointer<void>(absmax),
                               pointer<float>(nested),
                               pointer<float>(offset),
                               pointer<float>(codes),
                               pointer<float>(absmax_codes),
                               rows,
                               cols,
                               block_size};
  check(pyft_cpu_dequantize4(&weight, row_begin, row_end, pointer<void>(out), out_stride,
                             static_cast<pyft_dtype>(dtype), static_cast<pyft_isa>(isa), threads));
}

void dropout(uintptr_t x, int dtype, int64_t n, uint64_t seed, uint32_t threshold, float scale, uintptr_t out,
             int threads) {
  check(pyft_cpu_dropout(pointer<void>(x), static_cast<pyft_dtype>(dtype), n, seed, threshold, scale,
                         pointer<void>(out), threads));
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("best_isa", [] { return static_cast<int>(pyft_cpu_best_isa()); });
  m.def("quantize4", &quantize4, release());
  m.def("quantize_absmax", &quantize_absmax, release());
  m.def("dequantize4", &dequantize4, release());
  m.def("dropout", &dropout, release());
}
