// Normalization of rows for any CPU.
#include "norm.h"
#include "vectors_scalar.h"

const NormKernels norm_scalar = norm_kernels<Lanes4>;
