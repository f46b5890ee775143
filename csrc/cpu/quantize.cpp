// 4-bit block quantization on CPU: choice of the instruction set, threads, nested absmax. Rules: pyft/formats.py.
#include "quantize.h"

#include "parallel.h"

namespace {

constexpr int64_t kNestedBlock = 256;
// Elements below which a thread (half a millisecond to start on a small machine) costs more than it brings.
constexpr int64_t kEncodeGrain = 1 << 18;
constexpr int64_t kDecodeGrain = 1 << 20;

const Quantize4* kernels_of(pyft_isa isa) {
#ifdef PYFT_X86
  if (isa > pyft_cpu_best_isa()) return nullptr;
  if (isa == PYFT_ISA_AVX512) return &quantize4_avx512;
  if (isa == PYFT_ISA_AVX2) return &quantize4_avx2;
#endif
  return isa == PYFT_ISA_SCALAR ? &quantize4_scalar : nullptr;
}

bool valid_block(int64_t block_size) {
  return block_size >= 32 && block_size <= 4096 && (block_size & (block_size - 1)) == 0;
}

bool valid_dtype(pyft_dtype dtype) { return dtype >= PYFT_F32 && dtype <= PYFT_BF16; }

int64_t bytes_of(pyft_dtype dtype) { return dtype == PYFT_F32 ? 4 : 2; }

float absmax_at(const pyft_weight4& w, int64_t block) {
  if (!w.nested) return static_cast<const float*>(w.absmax)[block];
  const float scaled = w.absmax_codes[static_cast<const uint8_t*>(w.absmax)[block]] * w.nested[block / kNestedBlock];
  return scaled + *w.offset;
}

// Elements [begin, end) of the flattened weight, block by block.
template <class Decode>
void decode_range(const pyft_weight4& w, int64_t begin, int64_t end, Decode decode, char* out, int64_t item) {
  while (begin < end) {
    const int64_t block = begin / w.block_size;
    const int64_t stop = std::min(end, (block + 1) * w.block_size);
    decode(w.packed, begin, stop - begin, absmax_at(w, block), w.codes, out);
    out += (stop - begin) * item;
    begin = stop;
  }
}

}  // namespace

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

pyft_status pyft_cpu_quantize4(const void* x, pyft_dtype dtype, int64_t n, int64_t block_size, const float* midpoints,
                               int zero_code, uint8_t* packed, float* absmax, pyft_isa isa, int threads) {
  if (n < 0 || !valid_dtype(dtype) || !valid_block(block_size)) return PYFT_BAD_ARGUMENT;
  const Quantize4* kernels = kernels_of(isa);
  if (!kernels) return PYFT_BAD_ISA;
  const auto encode = kernels->encode[dtype];
  const auto* bytes = static_cast<const char*>(x);
  const int64_t blocks = (n + block_size - 1) / block_size;
  parallel_for(blocks, kEncodeGrain / block_size, threads, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * block_size;
      const int64_t count = std::min(block_size, n - first);
      absmax[block] = encode(bytes + first * bytes_of(dtype), count, midpoints, zero_code, packed + first / 2);
    }
  });
  return PYFT_OK;
}

pyft_status pyft_cpu_quantize_absmax(const float* x, int64_t n, const float* offset, const float* midpoints,
                                     int zero_code, uint8_t* codes, float* absmax) {
  if (n < 0) return PYFT_BAD_ARGUMENT;
  float centred[kNestedBlock];
  for (int64_t first = 0; first < n; first += kNestedBlock) {
    const int64_t count = std::min(kNestedBlock, n - first);
    for (int64_t i = 0; i < count; ++i) centred[i] = x[first + i] - *offset;
    const float scale = absmax_of<PYFT_F32>(centred, count);
    absmax[first / kNestedBlock] = scale;
    for (int64_t i = 0; i < count; ++i) {
      // lower_bound finds the first midpoint not below the value: as many lie strictly below it. NaN counts none.
      const float value = centred[i] / scale;
      const auto below = value == value ? std::lower_bound(midpoints, midpoints + 255, value) - midpoints : 0;
      codes[first + i] = static_cast<uint8_t>(scale == 0.0f ? zero_code : below);
    }
  }
  return PYFT_OK;
}

pyft_status pyft_cpu_dequantize4(const pyft_weight4* weight, int64_t row_begin, int64_t row_end, void* out,
                                 int64_t out_stride, pyft_dtype dtype, pyft_isa isa, int threads) {
  const pyft_weight4& w = *weight;
  if (!valid_dtype(dtype) || !valid_block(w.block_size)) return PYFT_BAD_ARGUMENT;
  if (row_begin < 0 || row_end < row_begin || row_end > w.rows || out_stride < w.cols) return PYFT_BAD_ARGUMENT;
  const Quantize4* kernels = kernels_of(isa);
  if (!kernels) return PYFT_BAD_ISA;
  const auto decode = kernels->decode[dtype];
  const int64_t item = bytes_of(dtype), rows = row_end - row_begin;
  auto* bytes = static_cast<char*>(out);
  if (out_stride == w.cols) {  // one long row: threads may meet inside a row
    const int64_t base = row_begin * w.cols;
    parallel_for(rows * w.cols, kDecodeGrain, threads, [&](int64_t begin, int64_t end) {
      decode_range(w, base + begin, base + end, decode, bytes + begin * item, item);
    });
    return PYFT_OK;
  }
  parallel_for(rows, std::max<int64_t>(1, kDecodeGrain / std::max<int64_t>(1, w.cols)), threads,
               [&](int64_t begin, int64_t end) {
                 for (int64_t r = begin; r < end; ++r) {
                   const int64_t first = (row_begin + r) * w.cols;
                   decode_range(w, first, first + w.cols, decode, bytes + r * out_stride * item, item);
                 }
               });
  return PYFT_OK;
}
