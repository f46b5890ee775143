// Dropout from a seed: the mask is a function of (seed, element index), so it is never stored.
#include "convert.h"
#include "parallel.h"
#include "philox.h"

namespace {

template <pyft_dtype D>
void dropout(const void* x, int64_t n, uint64_t seed, uint32_t threshold, float scale, void* out, int threads) {
  using T = typename Dtype<D>::type;
  const T* from = static_cast<const T*>(x);
  T* to = static_cast<T*>(out);
  parallel_for(n, 1 << 17, threads, [&](int64_t begin, int64_t end) {  // begin: a multiple of 4
    for (int64_t i = begin; i < end; i += 4) {
      const Words words = philox(static_cast<uint64_t>(i) / 4, seed);
      const int64_t count = std::min<int64_t>(4, end - i);
      for (int64_t j = 0; j < count; ++j) {
        const bool keep = words.w[j] >= threshold;
        to[i + j] = keep ? Dtype<D>::store(Dtype<D>::load(from[i + j]) * scale) : T{0};
      }
    }
  });
}

}  // namespace

pyft_status pyft_cpu_dropout(const void* x, pyft_dtype dtype, int64_t n, uint64_t seed, uint32_t threshold, float scale,
                             void* out, int threads) {
  if (n < 0) return PYFT_BAD_ARGUMENT;
  switch (dtype) {
    case PYFT_F32:
      dropout<PYFT_F32>(x, n, seed, threshold, scale, out, threads);
      return PYFT_OK;
    case PYFT_F16:
      dropout<PYFT_F16>(x, n, seed, threshold, scale, out, threads);
      return PYFT_OK;
    case PYFT_BF16:
      dropout<PYFT_BF16>(x, n, seed, threshold, scale, out, threads);
      return PYFT_OK;
  }
  return PYFT_BAD_ARGUMENT;
}
