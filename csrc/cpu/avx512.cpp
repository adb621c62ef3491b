// The kernels for AVX-512 (F, BW, DQ, VL): 512-bit vectors.
#if defined(__x86_64__)
#define XENT_TARGET "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"
#define XENT_VECTOR_BYTES 64
#define XENT_KERNELS avx512_kernels
#include "instruction_set.h"
#endif
