// Products of 16 x 16 and 16 x 8 matrices of 16-bit elements by a warp, and how it reads them from shared memory.
//
// Lane l = 4 g + t holds, with two neighbouring elements in a word, the first in its low half,
//
//   a [16 x 16]   a[0]: row g,     columns 2t, 2t + 1      a[2]: row g,     columns 2t + 8, 2t + 9
//                 a[1]: row g + 8, columns 2t, 2t + 1      a[3]: row g + 8, columns 2t + 8, 2t + 9
//   b [16 x 8]    b0: rows 2t, 2t + 1 of column g          b1: rows 2t + 8, 2t + 9 of column g
//   c [16 x 8]    c[0], c[1]: row g, columns 2t, 2t + 1    c[2], c[3]: row g + 8
//
// so two c side by side, rounded, are an a: what one product gives is an operand of the next without leaving registers.
//
// ldmatrix reads four 8 x 8 matrices of 16-bit elements, whose rows of 16 bytes lie anywhere: lane l says where row
// l % 8 of matrix l / 8 is. It gets two elements of row g of each, from column 2t on; transposed, of column g.
//
// sm_75 has no product of 16 columns of a: there it is two of 8, {a[0], a[1]} b0 and {a[2], a[3]} b1.
#pragma once

#include <type_traits>

#include "device.h"

namespace pyft {

// Whether these products exist on the GPU this is compiled for.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
template <class T>
constexpr bool kCanMultiply = std::is_same<T, __half>::value;
#else
template <class T>
constexpr bool kCanMultiply = true;
#endif

#ifdef PYFT_CPU_SIM

using SharedAddress = uintptr_t;

inline SharedAddress shared_address(const void* p) { return reinterpret_cast<uintptr_t>(p); }

template <bool kTransposed>
void load_matrices(SharedAddress row, uint32_t (&out)[4]) {
  sim::Shown shown;
  shown.address = reinterpret_cast<const void*>(row);
  sim::check_alignment(shown.address, 16);
  const sim::Shown* lanes = sim::show(shown);
  const unsigned g = sim::current % 32 / 4, t = sim::current % 4;
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    uint16_t pair[2];
    for (unsigned i = 0; i < 2; ++i) {
      const unsigned from = kTransposed ? 2 * t + i : g, column = kTransposed ? g : 2 * t + i;
      memcpy(&pair[i], static_cast<const uint16_t*>(lanes[matrix * 8 + from].address) + column, sizeof pair[i]);
    }
    memcpy(&out[matrix], pair, sizeof pair);
  }
  sim::show(shown);  // nobody writes there before all have read
}

template <class T>
void multiply(const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (&c)[4]) {
  const uint32_t words[6] = {a[0], a[1], a[2], a[3], b0, b1};
  T elements[12];
  memcpy(elements, words, sizeof words);
  sim::Shown shown;
  for (int i = 0; i < 8; ++i) shown.fragment.a[i] = widen(elements[i]);
  for (int i = 0; i < 4; ++i) shown.fragment.b[i] = widen(elements[8 + i]);
  const sim::Shown* lanes = sim::show(shown);
  const unsigned g = sim::current % 32 / 4, t = sim::current % 4;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned column = 2 * t + i % 2;
    for (unsigned half = 0; half < 2; ++half) {
      double sum = 0.0;
      for (unsigned k = 0; k < 8; ++k) {
        const float* left = lanes[4 * g + k / 2].fragment.a + 4 * half + 2 * (i / 2);
        const float* right = lanes[4 * column + k / 2].fragment.b + 2 * half;
        sum += double{left[k % 2]} * right[k % 2];
      }
      c[i] = static_cast<float>(c[i] + sum);
    }
  }
}

inline float exp2_fast(float x) { return std::exp2(x); }
inline float reciprocal_fast(float x) { return 1.0f / x; }

template <class V>
V read_only(const V* from) {
  return load_wide<V>(from);
}

template <class T>
void hide_origin(T&) {}

#else

// An address in shared memory, as instructions take it.
using SharedAddress = uint32_t;

__device__ inline SharedAddress shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

template <bool kTransposed>
__device__ inline void load_matrices(SharedAddress row, uint32_t (&out)[4]) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(row)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(row)
                 : "memory");
  }
}

// c += a b
template <class T>
__device__ inline void multiply(const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (&c)[4]);

template <>
__device__ inline void multiply<__half>(const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (&c)[4]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%8}, {%0, %1, %2, %3};\n\t"
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%6, %7}, {%9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

template <>
__device__ inline void multiply<__nv_bfloat16>(const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (&c)[4]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// 2^x, off by 2^-22 of itself at most; 0 for what fp32 has no normal number for.
__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x, off by one in the last place at most; 0 for infinity.
__device__ inline float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// From global memory that nobody writes meanwhile, wherever the compiler thinks the address is from.
template <class V>
__device__ inline V read_only(const V* from) {
  return __ldg(from);
}

// Keeps the compiler from knowing where a value comes from: from computing an address anew from more registers than it
// has, and from keeping in registers what can be computed anew.
template <class T>
__device__ inline void hide_origin(T*& address) {
  asm volatile("" : "+l"(address));
}

__device__ inline void hide_origin(unsigned& x) { asm volatile("" : "+r"(x)); }

#endif

}  // namespace pyft
