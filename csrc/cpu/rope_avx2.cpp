// Rotary embedding with AVX2.
#include "rope.h"
#include "vectors_avx2.h"

const RopeKernels rope_avx2 = rope_kernels<Lanes8>;
