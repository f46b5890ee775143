// Activations with AVX2.
#include "glu.h"
#include "vectors_avx2.h"

const GluKernels glu_avx2 = glu_kernels<Lanes8>;
