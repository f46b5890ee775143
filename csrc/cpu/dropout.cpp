// Dropout from a seed: the mask is a function of (seed, element index), so it is never stored. Philox4x32-10: Salmon et
// al., Parallel Random Numbers: As Easy as 1, 2, 3 (2011).
#include "convert.h"
#include "parallel.h"

namespace {

struct Words {
  uint32_t w[4];
};

Words philox(uint64_t counter, uint64_t seed) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0, p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

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
