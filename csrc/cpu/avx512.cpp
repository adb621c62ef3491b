// The kernels for AVX-512 (F, BW, DQ, VL): 512-bit vectors.
#if defined(__x86_64__)
#include "includes.h"

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC diagnostic ignored "-Wuninitialized"  // both in GCC's own header
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")
#endif

#define XENT_VECTOR_BYTES 64
#define XENT_KERNELS avx512_kernels
#include "instruction_set.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
