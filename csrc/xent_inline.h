// Marks a function that is always inlined, on host and device.
#pragma once

#if defined(__CUDACC__)
#define XENT_INLINE __host__ __device__ __forceinline__
#else
// Never compiled out of line: the linker could use one instruction set's copy for all others.
#define XENT_INLINE inline __attribute__((always_inline))
#endif
