// Attention with AVX-512.
#include "attention_kernels.h"
#include "vectors_avx512.h"

const AttentionKernels attention_avx512 = attention_kernels<Lanes16>;
