// Normalization of rows with AVX-512 and its rounding to bf16.
#include "norm.h"
#include "vectors_avx512.h"

const NormKernels norm_avx512bf16 = norm_kernels<Lanes16>;
