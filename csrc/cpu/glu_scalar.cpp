// Activations for any CPU.
#include "glu.h"
#include "vectors_scalar.h"

const GluKernels glu_scalar = glu_kernels<Lanes4>;
