// Arithmetic on arrays. On sm_100, one instruction computes two numbers of float; for sm_120, ptxas
// makes two of it.
#pragma once

#include <cuda_runtime.h>

namespace fused_xent::cuda {

template <typename A>
__device__ __forceinline__ A at(A x, int) {
  return x;
}
template <typename A, int N>
__device__ __forceinline__ A at(const A (&x)[N], int i) {
  return x[i];
}

#if __CUDA_ARCH__ >= 1000
template <typename X>
__device__ __forceinline__ float2 pair_at(const X& x, int i) {
  return make_float2(at(x, i), at(x, i + 1));
}
#endif

// x = a * b + c, rounded once. Each of a, b and c is an array, which may be x, or one number.
template <typename A, int N, typename X, typename Y, typename Z>
__device__ __forceinline__ void set_fma(A (&x)[N], const X& a, const Y& b, const Z& c) {
  int i = 0;
#if __CUDA_ARCH__ >= 1000
  if constexpr (sizeof(A) == 4) {
#pragma unroll
    for (; i + 1 < N; i += 2) {
      const float2 pair = __ffma2_rn(pair_at(a, i), pair_at(b, i), pair_at(c, i));
      x[i] = pair.x;
      x[i + 1] = pair.y;
    }
  }
#endif
#pragma unroll
  for (; i < N; ++i) x[i] = fma(at(a, i), at(b, i), at(c, i));
}

// x = a * b
template <typename A, int N, typename X, typename Y>
__device__ __forceinline__ void set_product(A (&x)[N], const X& a, const Y& b) {
  int i = 0;
#if __CUDA_ARCH__ >= 1000
  if constexpr (sizeof(A) == 4) {
#pragma unroll
    for (; i + 1 < N; i += 2) {
      const float2 pair = __fmul2_rn(pair_at(a, i), pair_at(b, i));
      x[i] = pair.x;
      x[i + 1] = pair.y;
    }
  }
#endif
#pragma unroll
  for (; i < N; ++i) x[i] = at(a, i) * at(b, i);
}

// The sum of the elements, in the same order for all architectures.
template <typename A, int N>
__device__ __forceinline__ A sum_of(const A (&x)[N]) {
  if constexpr (N % 2 == 1) {
    A sum = x[0];
#pragma unroll
    for (int i = 1; i < N; ++i) sum += x[i];
    return sum;
  } else {
    A even = x[0], odd = x[1];
#pragma unroll
    for (int i = 2; i < N; i += 2) {
#if __CUDA_ARCH__ >= 1000
      if constexpr (sizeof(A) == 4) {
        const float2 pair = __fadd2_rn(make_float2(even, odd), pair_at(x, i));
        even = pair.x;
        odd = pair.y;
        continue;
      }
#endif
      even += x[i];
      odd += x[i + 1];
    }
    return even + odd;
  }
}

}  // namespace fused_xent::cuda
