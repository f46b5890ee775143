// Block-wise quantization on CPU: choice of the instruction set, scales, threads. Rules: pyft/formats.py.
#include "quantize.h"

#include "parallel.h"

namespace {

// Elements below which a second thread costs more than it brings.
constexpr int64_t kEncodeGrain = 1 << 16;
constexpr int64_t kDecodeGrain = 1 << 18;

bool valid_block(int64_t block_size, int64_t cols) {
  const bool power = block_size >= 32 && block_size <= 4096 && (block_size & (block_size - 1)) == 0;
  return power || (block_size > 0 && block_size == cols);
}

bool valid_dtype(pyft_dtype dtype) { return dtype >= PYFT_F32 && dtype <= PYFT_BF16; }

int64_t bytes_of(pyft_dtype dtype) { return dtype == PYFT_F32 ? 4 : 2; }

// A block's scale and zero point: written as stored, returned as used.
struct Scaling {
  float scale, zero;
};

Scaling write_scale(Range range, const pyft_coding& coding, int64_t block, void* scales, uint8_t* zeros) {
  const float largest = -range.low > range.high ? -range.low : range.high;
  Scaling found = {(zeros ? range.high - range.low : largest) / coding.top, 0.0f};
  if (coding.e8m0) {
    const uint32_t exponent = bits_of(found.scale) >> 23 & 255;
    static_cast<uint8_t*>(scales)[block] = static_cast<uint8_t>(exponent);
    found.scale = exponent == 0 ? 0x1p-127f : exponent == 255 ? NAN : float_of(exponent << 23);
  } else {
    static_cast<float*>(scales)[block] = found.scale;
  }
  if (zeros) {
    const float quotient = -range.low / found.scale, most = static_cast<float>((1 << coding.bits) - 1);
    if (isfinite(quotient)) found.zero = fminf(fmaxf(rintf(quotient), 0.0f), most);
    zeros[block] = static_cast<uint8_t>(found.zero);
  }
  return found;
}

}  // namespace

const Quantize* quantize_kernels(pyft_isa isa) {
#ifdef PYFT_X86
  if (isa > pyft_cpu_best_isa()) return nullptr;
  if (isa == PYFT_ISA_AVX512) return &quantize_avx512;
  if (isa == PYFT_ISA_AVX2) return &quantize_avx2;
#endif
  return isa == PYFT_ISA_SCALAR ? &quantize_scalar : nullptr;
}

pyft_isa pyft_cpu_best_isa(void) {
#ifdef PYFT_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    return PYFT_ISA_AVX512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    return PYFT_ISA_AVX2;
  }
#endif
  return PYFT_ISA_SCALAR;
}

pyft_status pyft_cpu_quantize(const void* x, pyft_dtype dtype, int64_t n, int64_t block_size, const pyft_coding* coding,
                              uint8_t* packed, void* scales, uint8_t* zeros, pyft_isa isa, int threads) {
  const int bits = coding->bits;
  if (n < 0 || !valid_dtype(dtype) || block_size <= 0 || (bits != 8 && (bits != 4 || block_size % 2 != 0))) {
    return PYFT_BAD_ARGUMENT;
  }
  const Quantize* kernels = quantize_kernels(isa);
  if (!kernels) return PYFT_BAD_ISA;
  const auto range = kernels->range[dtype];
  const auto encode = kernels->encode[dtype][bits == 8];
  const auto* bytes = static_cast<const char*>(x);
  const int64_t blocks = (n + block_size - 1) / block_size;
  const int64_t grain = std::max<int64_t>(1, kEncodeGrain / block_size);
  parallel_for(blocks, grain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * block_size, count = std::min(block_size, n - first);
      const void* from = bytes + first * bytes_of(dtype);
      const Scaling found = write_scale(range(from, count), *coding, block, scales, zeros);
      encode(from, count, found.scale, found.zero, *coding, packed + first * bits / 8);
    }
  });
  return PYFT_OK;
}

pyft_status pyft_cpu_dequantize(const pyft_weight* weight, const pyft_slab* slab, void* out, int64_t out_stride,
                                pyft_dtype dtype, pyft_isa isa, int threads) {
  const pyft_weight& w = *weight;
  const pyft_slab& s = *slab;
  const int64_t rows = s.row_end - s.row_begin, cols = s.col_end - s.col_begin;
  if (!valid_dtype(dtype) || !valid_block(w.block_size, w.cols) || (w.bits != 4 && w.bits != 8)) {
    return PYFT_BAD_ARGUMENT;
  }
  if (s.row_begin < 0 || rows < 0 || s.row_end > w.rows || s.col_begin < 0 || cols < 0 || s.col_end > w.cols ||
      (rows > 1 && out_stride < cols)) {
    return PYFT_BAD_ARGUMENT;
  }
  const Quantize* kernels = quantize_kernels(isa);
  if (!kernels) return PYFT_BAD_ISA;
  const auto decode = kernels->decode[dtype][w.bits == 8];
  const int64_t item = bytes_of(dtype);
  auto* bytes = static_cast<char*>(out);
  if (cols == w.cols && (out_stride == cols || rows == 1)) {  // one run of elements
    const int64_t base = s.row_begin * w.cols;
    parallel_for(rows * cols, kDecodeGrain, threads,
                 [&](int64_t begin, int64_t end) { decode(w, base + begin, base + end, bytes + begin * item); });
    return PYFT_OK;
  }
  const int64_t grain = std::max<int64_t>(1, kDecodeGrain / std::max<int64_t>(1, cols));
  parallel_for(rows, grain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t first = (s.row_begin + r) * w.cols + s.col_begin;
      decode(w, first, first + cols, bytes + r * out_stride * item);
    }
  });
  return PYFT_OK;
}
