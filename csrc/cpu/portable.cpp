// The kernels for any processor: 128-bit vectors, which SSE2 and NEON have, or what the compiler
// makes of them.
#define XENT_VECTOR_BYTES 16
#define XENT_KERNELS portable_kernels
#include "instruction_set.h"
