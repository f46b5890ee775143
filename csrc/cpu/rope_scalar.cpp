// Rotary embedding for any CPU.
#include "rope.h"
#include "vectors_scalar.h"

const RopeKernels rope_scalar = rope_kernels<Lanes4>;
