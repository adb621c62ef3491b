// The kernels for AVX-512 with BF16, which rounds to bfloat16 in one instruction.
#if defined(__x86_64__)
#define XENT_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c"
#define XENT_VECTOR_BYTES 64
#define XENT_HAS_BF16
#define XENT_KERNELS avx512_bf16_kernels
#include "instruction_set.h"
#endif
