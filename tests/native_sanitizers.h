// What the programs native_sanitizers*.cpp share: heap blocks of exact size, comparisons, and the count of failures.
#pragma once

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <random>
#include <vector>

#include "pyft.h"

static std::mt19937 rng(1);
static int failures = 0, runs = 0;
static const char* subject = "";

inline void expect(bool ok, const char* what, long a, long b, long c) {
  ++runs;
  if (!ok && ++failures < 20) printf("%s %s: %ld %ld %ld\n", subject, what, a, b, c);
}

// The exit code of the program.
inline int report() {
  printf("%d checks, %d failures\n", runs, failures);
  return failures != 0;
}

// Exactly `bytes` bytes of heap; copies are byte for byte.
struct Buffer {
  explicit Buffer(size_t bytes) : size(bytes), at(static_cast<char*>(malloc(bytes))) { memset(at, 0xA5, bytes); }
  template <class T>
  explicit Buffer(const std::vector<T>& from) : Buffer(from.size() * sizeof(T)) {
    if (size) memcpy(at, from.data(), size);
  }
  Buffer(const Buffer& other) : Buffer(other.size) {
    if (size) memcpy(at, other.at, size);
  }
  ~Buffer() { free(at); }
  Buffer& randomise() {  // every pattern: NaN, infinities and subnormals are among them
    for (size_t i = 0; i < size; i += 4) {
      const uint32_t word = rng();
      memcpy(at + i, &word, size - i < 4 ? size - i : 4);
    }
    return *this;
  }
  template <class T>
  T* as() {
    return reinterpret_cast<T*>(at);
  }
  size_t size;
  char* at;
};

template <class T>
inline bool same(const Buffer& a, const Buffer& b, T magnitude, T infinity) {
  bool ok = a.size == b.size;
  for (size_t i = 0; ok && i < a.size; i += sizeof(T)) {
    T x, y;
    memcpy(&x, a.at + i, sizeof(T));
    memcpy(&y, b.at + i, sizeof(T));
    ok = x == y || ((x & magnitude) > infinity && (y & magnitude) > infinity);
  }
  return ok;
}

// The same bits, but for which NaN a NaN is.
inline bool same_values(const Buffer& a, const Buffer& b, pyft_dtype dtype) {
  if (dtype == PYFT_F32) return same<uint32_t>(a, b, 0x7FFFFFFF, 0x7F800000);
  return same<uint16_t>(a, b, 0x7FFF, dtype == PYFT_F16 ? 0x7C00 : 0x7F80);
}

inline bool same_bytes(const Buffer& a, const Buffer& b) {
  return a.size == b.size && (!a.size || memcmp(a.at, b.at, a.size) == 0);
}

inline long item_of(pyft_dtype dtype) { return dtype == PYFT_F32 ? 4 : 2; }

// Element i of a buffer of a dtype.
inline float value_of(const Buffer& b, size_t i, pyft_dtype dtype) {
  if (dtype == PYFT_F32) {
    float x;
    memcpy(&x, b.at + 4 * i, 4);
    return x;
  }
  uint16_t h;
  memcpy(&h, b.at + 2 * i, 2);
  if (dtype == PYFT_BF16) {
    const uint32_t u = static_cast<uint32_t>(h) << 16;
    float x;
    memcpy(&x, &u, 4);
    return x;
  }
  const float magnitude = (h >> 10 & 31) ? ldexpf(1024.0f + (h & 1023), (h >> 10 & 31) - 25) : ldexpf(h & 1023, -24);
  return h & 0x8000 ? -magnitude : magnitude;
}

// About -2 .. 2, exact in every dtype.
inline void fill(Buffer& b, pyft_dtype dtype) {
  const long item = item_of(dtype);
  for (size_t i = 0; i < b.size; i += item) {
    const float value = static_cast<float>(static_cast<int>(rng() % 257) - 128) / 64;
    uint32_t u;
    memcpy(&u, &value, 4);
    const uint16_t bf16 = u >> 16,
                   fp16 = (u >> 16 & 0x8000) | (u & 0x7FFFFFFF ? ((u >> 13) - (112 << 10)) & 0x7FFF : 0);
    memcpy(b.at + i,
           dtype == PYFT_F32 ? static_cast<void*>(&u) : const_cast<uint16_t*>(dtype == PYFT_F16 ? &fp16 : &bf16), item);
  }
}
