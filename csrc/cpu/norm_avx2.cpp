// Normalization of rows with AVX2.
#include "norm.h"
#include "vectors_avx2.h"

const NormKernels norm_avx2 = norm_kernels<Lanes8>;
