// Logits with AVX2.
#include "logits_kernels.h"
#include "vectors_avx2.h"

const LogitKernels logits_avx2 = logit_kernels<Lanes8>;
