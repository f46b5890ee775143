// Rotary embedding with AVX-512 and its rounding to bf16.
#include "rope.h"
#include "vectors_avx512.h"

const RopeKernels rope_avx512bf16 = rope_kernels<Lanes16>;
