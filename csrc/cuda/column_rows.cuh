// The rows of a thread by columns: one, or adjacent ones that 16 bytes hold, class by class.
#pragma once

#include <cstdint>

#include "labels.cuh"
#include "memory.cuh"

namespace fused_xent::cuda {

// Adjacent rows of one class in registers: one, or as many as 16 bytes hold.
template <typename T, int R>
struct Numbers {
  std::conditional_t<R == 1, Acc<T>, uint4> bits;

  // kAgain: forward_backward will read them again, so they should stay in the cache.
  template <bool kAgain>
  __device__ __forceinline__ void load(const T* p) {
    if constexpr (R == 1) {
      bits = to_acc(*p);
    } else {
      bits = kAgain ? load_vector_cached(p) : load_vector(p);
    }
  }
  __device__ __forceinline__ void store(T* p) const {
    if constexpr (R == 1) {
      *p = from_acc<T>(bits);
    } else {
      store_vector(p, bits);
    }
  }
  __device__ __forceinline__ void get(Acc<T> (&x)[R]) const {
    if constexpr (R == 1) {
      x[0] = bits;
    } else {
      unpack<T>(bits, x);
    }
  }
  // To the greater of both, row by row; NaN counts as nothing.
  __device__ __forceinline__ void raise(const Numbers& other) {
    if constexpr (R == 1) {
      bits = fmax(bits, other.bits);
    } else {
      bits = max_of<T>(bits, other.bits);
    }
  }
  __device__ __forceinline__ void set(const Acc<T> (&x)[R]) {
    if constexpr (R == 1) {
      bits = x[0];
    } else {
      bits = pack<T>(x);
    }
  }
};

// The labels t_j of R adjacent rows. is_shared: they are the same for all rows.
template <bool kAgain, int R, typename T, typename S>
__device__ __forceinline__ void load_spread(const Spread<T, S>& spread, bool is_shared, int j,
                                            Acc<T> (&t)[R]) {
  if (R == 1 || kIsUniform<S> || is_shared) {
    const Acc<T> one = spread.at(j);
#pragma unroll
    for (int r = 0; r < R; ++r) t[r] = one;
  } else if constexpr (!kIsUniform<S>) {
    constexpr int kN = kVector<S>;
#pragma unroll
    for (int begin = 0; begin < R; begin += kN) {
      Numbers<S, kN> numbers;
      Acc<S> part[kN];
      numbers.template load<kAgain>(spread.t + j * spread.class_stride + begin);
      numbers.get(part);
#pragma unroll
      for (int i = 0; i < kN; ++i) t[begin + i] = spread.smooth(part[i], j);
    }
  }
}

// The number of classes of a whole group, known at compile time.
template <int kGroup>
struct Whole {
  __device__ constexpr operator int() const { return kGroup; }
};

// The rows of a thread, and its classes: every n_workers-th group of kGroup classes.
template <int kGroup, int R>
struct Rows {
  int64_t first;
  int worker, n_workers, vocab_size;
  bool any, is_kept[R];
  int target[R];

  __device__ Rows(const Params& p, int64_t first, int worker, int n_workers)
      : first(first),
        worker(worker),
        n_workers(n_workers),
        vocab_size(static_cast<int>(p.vocab_size)),
        any(false) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      Target t;
      if (first < p.n_rows) t = read_target(p, first + r);
      is_kept[r] = !t.is_ignored;
      target[r] = t.index;
      any |= t.is_read();
    }
  }
  // Calls body(j, count) for each group of the thread's classes. No branch stands between the loads
  // of a whole group.
  template <typename Body>
  __device__ __forceinline__ void for_classes(const Body& body) const {
    const int step = n_workers * kGroup;
    int j = worker * kGroup;
    for (; j <= vocab_size - kGroup; j += step) {
      body(j, Whole<kGroup>{});
    }
    if (j < vocab_size) body(j, vocab_size - j);
  }
  // True if a target is in the group that begins with class j.
  __device__ __forceinline__ bool has_target_in_group(int j) const {
    bool has = false;
#pragma unroll
    for (int r = 0; r < R; ++r) has |= static_cast<unsigned>(target[r] ^ j) < kGroup;
    return has;
  }
  // False for -1. The number of workers is a power of two.
  __device__ bool owns(int j) const { return j >= 0 && (j / kGroup & (n_workers - 1)) == worker; }
};

}  // namespace fused_xent::cuda
