// Logits on CPU: choice of the instruction set, threads over segments of rows, and what the segments of a row give
// together.
#include "logits.h"

#include <algorithm>
#include <vector>

#include "parallel.h"

namespace {

constexpr int64_t kSegment = 1 << 15;  // columns; the same for any number of threads, or sums would depend on it

const LogitKernels* kernels_of(pyft_isa isa) {
#ifdef PYFT_X86
  if (isa > pyft_cpu_best_isa()) return nullptr;
  if (isa == PYFT_ISA_AVX512) return __builtin_cpu_supports("avx512bf16") ? &logits_avx512bf16 : &logits_avx512;
  if (isa == PYFT_ISA_AVX2) return &logits_avx2;
#endif
  return isa == PYFT_ISA_SCALAR ? &logits_scalar : nullptr;
}

bool is_bad(const pyft_logits& logits, pyft_dtype dtype) {
  return dtype < PYFT_F32 || dtype > PYFT_BF16 || logits.rows < 0 || logits.cols < 1 ||
         (logits.teacher.data && !logits.teacher_lse);
}

int64_t segments_of(const pyft_logits& logits) { return (logits.cols + kSegment - 1) / kSegment; }

// body(r, segment, begin, end) for all segments of all rows.
template <class Body>
void for_segments(const pyft_logits& logits, int threads, const Body& body) {
  const int64_t segments = segments_of(logits);
  parallel_rows(logits.rows * segments, std::min(logits.cols, kSegment), threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t r = i / segments, begin = i % segments * kSegment;
      body(r, i, begin, std::min(begin + kSegment, logits.cols));
    }
  });
}

// What the segments of a row give together.
LogitSums joined(const LogitSums* segments, int64_t count) {
  LogitSums all = segments[0];
  for (int64_t i = 1; i < count; ++i) {
    const LogitSums& next = segments[i];
    const float shift = std::max(all.shift, next.shift);
    const double ours = ::exp2(static_cast<double>(all.shift) - shift);
    const double theirs = ::exp2(static_cast<double>(next.shift) - shift);
    all.total = all.total * ours + next.total * theirs;
    all.mean = all.mean * ours + next.mean * theirs;
    all.smooth += next.smooth;
    all.cross += next.cross;
    all.shift = shift;
    if (next.top > all.top) all.top = next.top, all.from = next.from;
  }
  return all;
}

// scale z at column c of row r.
float scaled_logit(const pyft_logits& logits, int64_t r, int64_t c, pyft_dtype dtype) {
  const void* z = logits.logits.data;
  const int64_t i = r * logits.logits.stride + c;
  const float value = dtype == PYFT_F32   ? static_cast<const float*>(z)[i]
                      : dtype == PYFT_F16 ? Dtype<PYFT_F16>::load(static_cast<const uint16_t*>(z)[i])
                                          : Dtype<PYFT_BF16>::load(static_cast<const uint16_t*>(z)[i]);
  return value * logits.logits.scale;
}

// Row r of the outputs.
void write_row(const pyft_logits& logits, const LogitSums& sums, const pyft_logit_statistics& out, int64_t r,
               pyft_dtype dtype, const LogitKernels& kernels) {
  const auto set = [&](float* to, double value) {
    if (to) to[r] = static_cast<float>(value);
  };
  const int64_t label = logits.labels[r];
  const bool found = label >= 0 && label < logits.cols;
  const auto u = [&](float scaled) { return kernels.capped(logits.logits, scaled); };
  // Where all u are beyond 2e38, the logarithm of their number is nothing to them.
  const bool summed = isnan(sums.total) || (sums.total > 0.0 && !isinf(sums.total));
  set(out.lse, summed ? (sums.shift + log2(sums.total)) / kLog2E : u(sums.top));
  set(out.target, out.target && found ? u(scaled_logit(logits, r, label, dtype)) : 0.0f);
  set(out.smooth, sums.smooth);
  set(out.mean, sums.mean / sums.total);
  set(out.cross, sums.cross);
  set(out.top, isnan(sums.total) ? NAN : u(sums.top));
  if (out.argmax) out.argmax[r] = kernels.argmax[dtype](logits, r, sums.from, sums.top);
}

}  // namespace

pyft_status pyft_cpu_logit_statistics(const pyft_logits* logits, const pyft_logit_statistics* statistics,
                                      pyft_dtype dtype, pyft_isa isa, int threads) {
  if (is_bad(*logits, dtype) || (logits->rows && !statistics->lse)) return PYFT_BAD_ARGUMENT;
  if (statistics->cross && !logits->teacher.data) return PYFT_BAD_ARGUMENT;
  const LogitKernels* kernels = kernels_of(isa);
  if (!kernels) return PYFT_BAD_ISA;
  const int64_t segments = segments_of(*logits);
  const bool more = statistics->smooth || statistics->mean || statistics->cross;
  std::vector<LogitSums> sums(static_cast<size_t>(logits->rows * segments));
  for_segments(*logits, threads, [&](int64_t r, int64_t i, int64_t begin, int64_t end) {
    sums[static_cast<size_t>(i)] = kernels->statistics[dtype](*logits, more, r, begin, end);
  });
  constexpr int64_t kCost = 1024;  // of a row, in elements
  parallel_rows(logits->rows, kCost, threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      write_row(*logits, joined(&sums[static_cast<size_t>(r * segments)], segments), *statistics, r, dtype, *kernels);
    }
  });
  return PYFT_OK;
}

pyft_status pyft_cpu_logit_gradient(const pyft_logits* logits, const pyft_logit_gradient* gradient, pyft_dtype dtype,
                                    pyft_isa isa, int threads) {
  if (is_bad(*logits, dtype) || (logits->rows > 1 && logits->logits.stride < logits->cols)) return PYFT_BAD_ARGUMENT;
  if ((gradient->g_mean && !gradient->mean) || (gradient->g_cross && !logits->teacher.data)) return PYFT_BAD_ARGUMENT;
  const LogitKernels* kernels = kernels_of(isa);
  if (!kernels) return PYFT_BAD_ISA;
  for_segments(*logits, threads, [&](int64_t r, int64_t, int64_t begin, int64_t end) {
    kernels->gradient[dtype](*logits, *gradient, r, begin, end);
  });
  return PYFT_OK;
}
