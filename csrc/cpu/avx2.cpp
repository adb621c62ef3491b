// The kernels for AVX2 with FMA and F16C: 256-bit vectors.
#if defined(__x86_64__)
#include "includes.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define XENT_VECTOR_BYTES 32
#define XENT_KERNELS avx2_kernels
#include "instruction_set.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
