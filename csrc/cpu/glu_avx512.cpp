// Activations with AVX-512.
#include "glu.h"
#include "vectors_avx512.h"

const GluKernels glu_avx512 = glu_kernels<Lanes16>;
