// Attention with AVX2.
#include "attention_kernels.h"
#include "vectors_avx2.h"

const AttentionKernels attention_avx2 = attention_kernels<Lanes8>;
