// Logits with AVX-512.
#include "logits_kernels.h"
#include "vectors_avx512.h"

const LogitKernels logits_avx512 = logit_kernels<Lanes16>;
