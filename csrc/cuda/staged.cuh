// The rows of a block in shared memory, copied from global memory and back by 16 bytes.
#pragma once

#include <cstdint>

#include "../xent_math.h"
#include "memory.cuh"

namespace fused_xent::cuda {

// kSkew bytes after each 128 put them into different banks.
template <typename T>
class Staged {
 public:
  // After the stats of `threads` rows.
  __device__ Staged(char* memory, int vocab_size)
      : memory_(memory + blockDim.x * sizeof(RowStats<Acc<T>>)), vocab_size_(vocab_size) {}

  __device__ __forceinline__ T* at(int row, int j) const {
    return reinterpret_cast<T*>(place((row * vocab_size_ + j) * static_cast<int>(sizeof(T))));
  }
  // Copies n_rows rows from global memory, or to it.
  __device__ __forceinline__ void copy_from(const T* global, int n_rows) const {
    const int n = n_rows * vocab_size_, n_vectors = n / kVector<T>;
    for (int first = 0; vector(first) < n_vectors; first += kInFlight) {
      uint4 bits[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int v = vector(first + i);
        if (v < n_vectors) bits[i] = load_vector(global + v * kVector<T>);
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int v = vector(first + i);
        auto* to = reinterpret_cast<uint32_t*>(place(v * 16));
        if (v >= n_vectors) continue;
        to[0] = bits[i].x;
        to[1] = bits[i].y;
        to[2] = bits[i].z;
        to[3] = bits[i].w;
      }
    }
    const int last = n_vectors * kVector<T> + static_cast<int>(threadIdx.x);
    if (last < n) *at(0, last) = global[last];
  }
  __device__ __forceinline__ void copy_to(T* global, int n_rows) const {
    const int n = n_rows * vocab_size_, n_vectors = n / kVector<T>;
    for (int i = 0; vector(i) < n_vectors; ++i) {
      const auto* from = reinterpret_cast<const uint32_t*>(place(vector(i) * 16));
      store_vector(global + vector(i) * kVector<T>, make_uint4(from[0], from[1], from[2], from[3]));
    }
    const int last = n_vectors * kVector<T> + static_cast<int>(threadIdx.x);
    if (last < n) global[last] = *at(0, last);
  }

 private:
  static constexpr int kSkew = sizeof(T) == 8 ? 8 : 4;
  static constexpr int kInFlight = 4;

  __device__ __forceinline__ char* place(int byte) const {
    return memory_ + byte + byte / 128 * kSkew;
  }
  static __device__ __forceinline__ int vector(int i) {
    return static_cast<int>(threadIdx.x) + i * static_cast<int>(blockDim.x);
  }

  char* memory_;
  int vocab_size_;
};

}  // namespace fused_xent::cuda
