// Activations with AVX-512 and its rounding to bf16.
#include "glu.h"
#include "vectors_avx512.h"

const GluKernels glu_avx512bf16 = glu_kernels<Lanes16>;
