// Included by two files: each has its own static kernels and variables of the same mangled name.
#include <cuda_runtime.h>

static __device__ int value;
static __global__ void load(int* result) { *result = value * TWIN_FACTOR + TWIN_OFFSET; }

static int factor_times(int number) {
  int result = 0;
  cudaMemcpyToSymbol(value, &number, sizeof number);
  load<<<1, 1>>>(&result);
  return cudaGetLastError() == cudaSuccess ? result : -1;
}
