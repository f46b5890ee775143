// The C ABI of pyft's native kernels: plain pointers, sizes, a stream. No torch, no Python.
//
// Every function returns a pyft_status and checks nothing it would have to read device memory for. Sizes count
// elements, never bytes; strides count elements of the pointed-to type. Layouts and rounding rules are those of
// pyft/formats.py.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
  PYFT_OK = 0,
  PYFT_BAD_ARGUMENT = 1,  // a size, dtype or block size outside the documented range
  PYFT_BAD_ISA = 2,       // the instruction set asked for is not available on this CPU
  PYFT_CUDA_ERROR = 3,    // pyft_cuda_error_string() says what the CUDA runtime answered
} pyft_status;

typedef enum { PYFT_F32 = 0, PYFT_F16 = 1, PYFT_BF16 = 2 } pyft_dtype;

typedef enum { PYFT_ISA_SCALAR = 0, PYFT_ISA_AVX2 = 1, PYFT_ISA_AVX512 = 2 } pyft_isa;

// A weight of `rows` x `cols` elements in a 4-bit block format, as in pyft/formats.py.
typedef struct {
  const uint8_t* packed;  // [ceil(rows * cols / 2)], first element in the high nibble
  const void* absmax;     // fp32 [blocks], or uint8 [blocks] when `nested` is set; blocks = ceil(rows*cols/block_size)
  const float* nested;    // fp32 [ceil(blocks / 256)], or NULL: absmax is not nested
  const float* offset;    // fp32 [1], set when `nested` is
  const float* codes;     // fp32 [16]
  const float* absmax_codes;  // fp32 [256], set when `nested` is
  int64_t rows, cols;
  int64_t block_size;  // a power of two, 32 .. 4096
} pyft_weight4;

// ---- CPU ----------------------------------------------------------------------------------------------------------

// The best instruction set this CPU and its operating system support.
pyft_isa pyft_cpu_best_isa(void);

// x [n] in `dtype` -> packed [ceil(n/2)] and absmax fp32 [ceil(n / block_size)].
// midpoints: fp32 [15]. zero_code: what every element of an all-zero block stores.
pyft_status pyft_cpu_quantize4(const void* x, pyft_dtype dtype, int64_t n, int64_t block_size, const float* midpoints,
                               int zero_code, uint8_t* packed, float* absmax, pyft_isa isa, int threads);

// x fp32 [n] -> codes uint8 [n] and absmax fp32 [ceil(n / 256)], after subtracting *offset from each element.
// midpoints: fp32 [255].
pyft_status pyft_cpu_quantize_absmax(const float* x, int64_t n, const float* offset, const float* midpoints,
                                     int zero_code, uint8_t* codes, float* absmax);

// Rows [row_begin, row_end) of the weight -> out, whose row r starts at out + (r - row_begin) * out_stride.
pyft_status pyft_cpu_dequantize4(const pyft_weight4* weight, int64_t row_begin, int64_t row_end, void* out,
                                 int64_t out_stride, pyft_dtype dtype, pyft_isa isa, int threads);

// out[i] = keep(i) ? x[i] * scale : 0 for i in [0, n); keep(i): word i % 4 of Philox4x32-10(counter i / 4, key seed)
// >= threshold. The product is taken in fp32 and rounded once to `dtype`.
pyft_status pyft_cpu_dropout(const void* x, pyft_dtype dtype, int64_t n, uint64_t seed, uint32_t threshold, float scale,
                             void* out, int threads);

// ---- CUDA (pointers are device pointers; `stream` is a cudaStream_t) ---------------------------------------------

// Number of visible devices; 0 when there is no driver.
int pyft_cuda_device_count(void);

// The text of the last CUDA error this thread met in these functions.
const char* pyft_cuda_error_string(void);

// As pyft_cpu_quantize4.
pyft_status pyft_cuda_quantize4(const void* x, pyft_dtype dtype, int64_t n, int64_t block_size, const float* midpoints,
                                int zero_code, uint8_t* packed, float* absmax, void* stream);

// As pyft_cpu_quantize_absmax.
pyft_status pyft_cuda_quantize_absmax(const float* x, int64_t n, const float* offset, const float* midpoints,
                                      int zero_code, uint8_t* codes, float* absmax, void* stream);

// As pyft_cpu_dequantize4; one launch, nested absmax included.
pyft_status pyft_cuda_dequantize4(const pyft_weight4* weight, int64_t row_begin, int64_t row_end, void* out,
                                  int64_t out_stride, pyft_dtype dtype, void* stream);

#ifdef __cplusplus
}
#endif
