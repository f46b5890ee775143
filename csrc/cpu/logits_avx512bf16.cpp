// Logits with AVX-512 and its rounding to bf16.
#include "logits_kernels.h"
#include "vectors_avx512.h"

const LogitKernels logits_avx512bf16 = logit_kernels<Lanes16>;
