// Logits for any CPU.
#include "logits_kernels.h"
#include "vectors_scalar.h"

const LogitKernels logits_scalar = logit_kernels<Lanes4>;
