// Attention on any CPU.
#include "attention_kernels.h"
#include "vectors_scalar.h"

const AttentionKernels attention_scalar = attention_kernels<Lanes4>;
