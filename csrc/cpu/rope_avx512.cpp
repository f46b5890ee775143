// Rotary embedding with AVX-512.
#include "rope.h"
#include "vectors_avx512.h"

const RopeKernels rope_avx512 = rope_kernels<Lanes16>;
