// Runs every CPU kernel on buffers of their exact size; built with sanitizers by test_native_sanitizers.py.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <array>
#include <random>
#include <vector>

#include "pyft.h"

static std::mt19937 rng(1);
static int failures = 0, runs = 0;

static void expect(bool ok, const char* what, long a, long b, long c) {
  ++runs;
  if (!ok && ++failures < 20) printf("%s: %ld %ld %ld\n", what, a, b, c);
}

// Exactly `bytes` of heap; `filler` all over when nothing is to be read from it.
struct Buffer {
  explicit Buffer(size_t bytes, int filler = 0xA5) : size(bytes), at(static_cast<char*>(malloc(bytes))) {
    memset(at, filler, bytes);
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { free(at); }
  void randomise() {
    for (size_t i = 0; i < size; ++i) at[i] = static_cast<char>(rng());
  }
  size_t size;
  char* at;
};

static bool equal(const Buffer& a, const Buffer& b) { return !a.size || memcmp(a.at, b.at, a.size) == 0; }

template <class T>
static bool same(const Buffer& a, const Buffer& b, T magnitude, T infinity) {
  bool ok = true;
  for (size_t i = 0; i < a.size; i += sizeof(T)) {
    T x, y;
    memcpy(&x, a.at + i, sizeof(T));
    memcpy(&y, b.at + i, sizeof(T));
    ok &= x == y || ((x & magnitude) > infinity && (y & magnitude) > infinity);
  }
  return ok;
}

// The same bits, but for which NaN a NaN is.
static bool same_values(const Buffer& a, const Buffer& b, pyft_dtype dtype) {
  if (dtype == PYFT_F32) return same<uint32_t>(a, b, 0x7FFFFFFF, 0x7F800000);
  return same<uint16_t>(a, b, 0x7FFF, dtype == PYFT_F16 ? 0x7C00 : 0x7F80);
}

static float midpoints[15], codes[16], absmax_codes[256], absmax_midpoints[255];

static void quantize(long n, long block, pyft_dtype dtype, int threads) {
  const long blocks = (n + block - 1) / block;
  Buffer x(n * (dtype == PYFT_F32 ? 4 : 2));
  x.randomise();  // every pattern: NaN, infinities and subnormals are among them
  Buffer packed((n + 1) / 2), absmax(blocks * 4);
  for (int isa = 0; isa <= pyft_cpu_best_isa(); ++isa) {
    Buffer p((n + 1) / 2), m(blocks * 4);
    const auto status = pyft_cpu_quantize4(x.at, dtype, n, block, midpoints, 7, reinterpret_cast<uint8_t*>(p.at),
                                           reinterpret_cast<float*>(m.at), static_cast<pyft_isa>(isa), threads);
    expect(status == PYFT_OK, "quantize4 status", n, block, isa);
    if (isa == 0) {
      memcpy(packed.at, p.at, p.size);
      memcpy(absmax.at, m.at, m.size);
    }
    expect(equal(p, packed), "quantize4 packed", n, block, isa);
    expect(equal(m, absmax), "quantize4 absmax", n, block, isa);
  }
}

static void quantize_absmax(long n) {
  Buffer x(n * 4), offset(4), out(n), absmax((n + 255) / 256 * 4);
  x.randomise();
  const float mean = 0.25f;
  memcpy(offset.at, &mean, 4);
  const auto status =
      pyft_cpu_quantize_absmax(reinterpret_cast<float*>(x.at), n, reinterpret_cast<float*>(offset.at), absmax_midpoints,
                               127, reinterpret_cast<uint8_t*>(out.at), reinterpret_cast<float*>(absmax.at));
  expect(status == PYFT_OK, "quantize_absmax status", n, 0, 0);
}

static void dequantize(long rows, long cols, long begin, long end, long gap, long block, bool nested, pyft_dtype dtype,
                       int threads) {
  const long n = rows * cols, blocks = (n + block - 1) / block, item = dtype == PYFT_F32 ? 4 : 2;
  Buffer packed((n + 1) / 2), absmax(blocks * (nested ? 1 : 4)), outer((blocks + 255) / 256 * 4), offset(4);
  for (Buffer* part : {&packed, &absmax, &outer, &offset}) part->randomise();
  const pyft_weight4 weight = {reinterpret_cast<uint8_t*>(packed.at),
                               absmax.at,
                               nested ? reinterpret_cast<float*>(outer.at) : nullptr,
                               nested ? reinterpret_cast<float*>(offset.at) : nullptr,
                               codes,
                               nested ? absmax_codes : nullptr,
                               rows,
                               cols,
                               block};
  const long stride = cols + gap, count = end - begin;
  const size_t size = count ? ((count - 1) * stride + cols) * item : 0;  // the last row has no tail
  Buffer first(size);
  for (int isa = 0; isa <= pyft_cpu_best_isa(); ++isa) {
    Buffer out(size);
    const auto status =
        pyft_cpu_dequantize4(&weight, begin, end, out.at, stride, dtype, static_cast<pyft_isa>(isa), threads);
    expect(status == PYFT_OK, "dequantize4 status", rows, cols, isa);
    if (isa == 0) memcpy(first.at, out.at, size);
    expect(same_values(out, first, dtype), "dequantize4 values", rows, cols, isa);
  }
}

static void dropout(long n, pyft_dtype dtype, int threads) {
  Buffer x(n * (dtype == PYFT_F32 ? 4 : 2)), out(x.size);
  x.randomise();
  expect(pyft_cpu_dropout(x.at, dtype, n, rng() * 0x100000001ull, 1u << 30, 1.5f, out.at, threads) == PYFT_OK,
         "dropout status", n, dtype, threads);
}

int main() {
  for (int i = 0; i < 16; ++i) codes[i] = (i - 7) / 8.0f;
  for (int i = 0; i < 15; ++i) midpoints[i] = (codes[i] + codes[i + 1]) / 2;
  for (int i = 0; i < 256; ++i) absmax_codes[i] = (i - 127) / 128.0f;
  for (int i = 0; i < 255; ++i) absmax_midpoints[i] = (absmax_codes[i] + absmax_codes[i + 1]) / 2;
  const pyft_dtype dtypes[] = {PYFT_F32, PYFT_F16, PYFT_BF16};
  for (pyft_dtype dtype : dtypes) {
    for (long n = 0; n < 200; ++n) quantize(n, n % 2 ? 32 : 64, dtype, 1);
    for (long block = 32; block <= 4096; block *= 2) {
      for (long n : {block - 1, block, block + 1, 3 * block + 17}) quantize(n, block, dtype, 2);
    }
    quantize(70 * 4304 + 33, 64, dtype, 3);
    for (long cols : {0, 1, 2, 7, 31, 32, 33, 64, 97, 100, 4304}) {
      for (long begin = 0; begin < 5; begin += 3) {
        for (long gap : {0, 1, 16}) dequantize(5, cols, begin, 5, gap, 64, (cols + begin) % 2, dtype, 2);
        dequantize(5, cols, begin, begin, 1, 32, false, dtype, 1);
      }
    }
    for (long block = 32; block <= 4096; block *= 2) dequantize(3, 777, 1, 3, 3, block, block % 3, dtype, 1);
    for (long gap : {0, 5}) dequantize(301, 1031, 1, 301, gap, 128, true, dtype, 3);
    for (long n : {0, 1, 3, 4, 5, 1001, 40003}) dropout(n, dtype, 3);
  }
  for (long n : {0, 1, 255, 256, 257, 1000}) quantize_absmax(n);

  uint8_t byte = 0;
  float value = 0;
  const pyft_weight4 weight = {&byte, &value, nullptr, nullptr, codes, nullptr, 1, 1, 64};
  const auto scalar = PYFT_ISA_SCALAR;
  for (long block : {0, -64, 16, 48, 8192}) {
    const auto status = pyft_cpu_quantize4(&value, PYFT_F32, 1, block, midpoints, 7, &byte, &value, scalar, 1);
    expect(status == PYFT_BAD_ARGUMENT, "bad block", block, 0, 0);
  }
  for (auto [begin, end, stride] : {std::array<long, 3>{-1, 1, 1}, {0, 2, 1}, {1, 0, 1}, {0, 1, 0}}) {
    const auto status = pyft_cpu_dequantize4(&weight, begin, end, &value, stride, PYFT_F32, scalar, 1);
    expect(status == PYFT_BAD_ARGUMENT, "bad rows", begin, end, stride);
  }
  expect(pyft_cpu_quantize4(&value, PYFT_F32, -1, 64, midpoints, 7, &byte, &value, scalar, 1) == PYFT_BAD_ARGUMENT,
         "negative n", 0, 0, 0);
  expect(pyft_cpu_dropout(&value, PYFT_F32, -1, 0, 0, 1, &value, 1) == PYFT_BAD_ARGUMENT, "negative n", 1, 0, 0);
  printf("%d checks, %d failures\n", runs, failures);
  return failures != 0;
}
