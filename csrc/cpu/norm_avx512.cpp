// Normalization of rows with AVX-512.
#include "norm.h"
#include "vectors_avx512.h"

const NormKernels norm_avx512 = norm_kernels<Lanes16>;
