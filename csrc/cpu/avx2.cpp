// The kernels for AVX2 with FMA and F16C: 256-bit vectors.
#if defined(__x86_64__)
#define XENT_TARGET "avx2,fma,f16c"
#define XENT_VECTOR_BYTES 32
#define XENT_KERNELS avx2_kernels
#include "instruction_set.h"
#endif
