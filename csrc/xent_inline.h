// How a small function is inlined, on host and device.
#pragma once

#if defined(__CUDACC__)
#define XENT_INLINE __host__ __device__ __forceinline__
#else
// Never emitted out of line: a linker could pick one instruction set's copy for every other.
#define XENT_INLINE inline __attribute__((always_inline))
#endif
