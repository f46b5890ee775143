// What each instruction set provides for the linear that decodes its weight on the fly.
#pragma once

#include "convert.h"

constexpr int kTile = 4;  // rows of x, and rows of the weight, that are multiplied together

// Adds to acc[i * kTile + r] the dot product of row i of x and row r of w, for i < m <= kTile and r < kTile; `depth`
// is a multiple of 32 and the rows are padded to it with zeros.
using Multiply = void (*)(const void* x, int64_t x_stride, int m, const void* w, int64_t w_stride, int64_t depth,
                          float* acc);

// One table per instruction set, indexed by the weight's pyft_dtype; x is fp32.
struct Qlinear {
  Multiply multiply[3];
};

extern const Qlinear qlinear_scalar;
#ifdef PYFT_X86
extern const Qlinear qlinear_avx2;
extern const Qlinear qlinear_avx512;
extern const Multiply qlinear_avx512bf16;  // x and w in bf16
#endif
