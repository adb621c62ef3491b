// Memory accesses, 16 bytes at a time wherever a row allows it, and number formats.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <type_traits>

namespace fused_xent::cuda {

// The type that sums are kept in.
template <typename T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
constexpr int kVector = static_cast<int>(16 / sizeof(T));  // elements of an access

// They stand for the type of the labels where no labels are read, see Spread. Uniform: label
// smoothing without class weights. Capped: softcapped logits.
struct Uniform {};
struct Capped {};
struct UniformCapped {};

template <typename S>
constexpr bool kIsCapped = std::is_same_v<S, Capped> || std::is_same_v<S, UniformCapped>;
template <typename S>
constexpr bool kIsUniform = std::is_same_v<S, Uniform> || std::is_same_v<S, UniformCapped>;
template <typename S>
constexpr bool kReadsLabels = !std::is_void_v<S> && !kIsUniform<S> && !kIsCapped<S>;

// Blocks of 256 threads that a multiprocessor must have room for, which limits their registers.
// Float64 and labels that are read need more registers, as does a softcap.
template <typename T, typename S>
constexpr int kMinBlocks = sizeof(T) == 8 || kReadsLabels<S> ? 2
                           : kIsCapped<S>                    ? 3
                                                             : 4;

template <typename A>
constexpr A kLowest = std::numeric_limits<A>::lowest();
template <typename A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();
template <typename A>
constexpr A kNaN = std::numeric_limits<A>::quiet_NaN();

__device__ __forceinline__ float to_acc(float x) { return x; }
__device__ __forceinline__ double to_acc(double x) { return x; }
__device__ __forceinline__ float to_acc(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_acc(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_acc(Acc<T> x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return x;
  }
}

template <typename T>
__device__ __forceinline__ bool is_vector_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

// For what is read for the last time, or written: it need not stay in the cache.
template <typename T>
__device__ __forceinline__ uint4 load_vector(const T* p) {
  return __ldcs(reinterpret_cast<const uint4*>(p));
}
template <typename T>
__device__ __forceinline__ void store_vector(T* p, uint4 bits) {
  __stcs(reinterpret_cast<uint4*>(p), bits);
}
// With the cache's default policy: for what is read again (by forward_backward, or class weights
// for the next row), and faster where one row is read while another is written (bench/NOTES.md).
template <typename T>
__device__ __forceinline__ uint4 load_vector_cached(const T* p) {
  return *reinterpret_cast<const uint4*>(p);
}
template <typename T>
__device__ __forceinline__ void store_vector_cached(T* p, uint4 bits) {
  __stwb(reinterpret_cast<uint4*>(p), bits);
}

template <typename T>
__device__ __forceinline__ void unpack(uint4 bits, Acc<T> (&x)[kVector<T>]) {
  const uint32_t words[] = {bits.x, bits.y, bits.z, bits.w};
  if constexpr (std::is_same_v<T, double>) {
    x[0] = __hiloint2double(bits.y, bits.x);
    x[1] = __hiloint2double(bits.w, bits.z);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (std::is_same_v<T, float>) {
        x[i] = __uint_as_float(words[i]);
      } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        x[2 * i] = __uint_as_float(words[i] << 16);
        x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
      } else {
        const float2 pair = __half22float2(reinterpret_cast<const __half2&>(words[i]));
        x[2 * i] = pair.x;
        x[2 * i + 1] = pair.y;
      }
    }
  }
}

template <typename T>
__device__ __forceinline__ uint4 pack(const Acc<T> (&x)[kVector<T>]) {
  uint32_t words[4];
  if constexpr (std::is_same_v<T, double>) {
    return make_uint4(__double2loint(x[0]), __double2hiint(x[0]), __double2loint(x[1]),
                      __double2hiint(x[1]));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (std::is_same_v<T, float>) {
        words[i] = __float_as_uint(x[i]);
      } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
        words[i] = reinterpret_cast<const uint32_t&>(pair);
      } else {
        const __half2 pair = __floats2half2_rn(x[2 * i], x[2 * i + 1]);
        words[i] = reinterpret_cast<const uint32_t&>(pair);
      }
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// Stands for classes that do not exist: their exponentials are 0.
template <typename T>
__device__ __forceinline__ uint4 all_minus_infinity() {
  constexpr uint32_t kWord = std::is_same_v<T, double>          ? 0
                             : std::is_same_v<T, float>         ? 0xff800000u
                             : std::is_same_v<T, __nv_bfloat16> ? 0xff80ff80u
                                                                : 0xfc00fc00u;
  const uint32_t high = std::is_same_v<T, double> ? 0xfff00000u : kWord;
  return make_uint4(kWord, high, kWord, high);
}

template <typename T>  // of 16 bits
using PairOf = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;

// Element by element; 16-bit pairs need one instruction. NaN is ignored here and makes the sum NaN.
template <typename T>
__device__ __forceinline__ uint4 max_of(uint4 a, uint4 b) {
  if constexpr (sizeof(T) == 2) {
    const auto one = [](uint32_t u, uint32_t v) {
      const auto pair = __hmax2(reinterpret_cast<PairOf<T>&>(u), reinterpret_cast<PairOf<T>&>(v));
      return reinterpret_cast<const uint32_t&>(pair);
    };
    return make_uint4(one(a.x, b.x), one(a.y, b.y), one(a.z, b.z), one(a.w, b.w));
  } else {
    Acc<T> x[kVector<T>], y[kVector<T>];
    unpack<T>(a, x);
    unpack<T>(b, y);
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) x[i] = fmax(x[i], y[i]);
    return pack<T>(x);
  }
}

// Combines all words of some vectors.
template <typename Word, int N, typename Combine>
__device__ __forceinline__ Word reduce(const uint4 (&bits)[N], const Combine& combine) {
  constexpr int kWords = static_cast<int>(16 / sizeof(Word));
  Word words[kWords];
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    words[w] = reinterpret_cast<const Word(&)[kWords]>(bits[0])[w];
#pragma unroll
    for (int u = 1; u < N; ++u) {
      words[w] = combine(words[w], reinterpret_cast<const Word(&)[kWords]>(bits[u])[w]);
    }
  }
#pragma unroll
  for (int half = kWords / 2; half > 0; half /= 2) {
#pragma unroll
    for (int w = 0; w < half; ++w) words[w] = combine(words[w], words[w + half]);
  }
  return words[0];
}

// The greatest element of some vectors. NaN is ignored.
template <typename T, int N>
__device__ __forceinline__ Acc<T> greatest(const uint4 (&bits)[N]) {
  if constexpr (sizeof(T) == 2) {
    const auto top = reduce<PairOf<T>>(bits, [](auto a, auto b) { return __hmax2(a, b); });
    return fmax(to_acc(top.x), to_acc(top.y));
  } else {
    return reduce<T>(bits, [](T a, T b) { return fmax(a, b); });
  }
}

// True if no absolute value of an element exceeds the limit rounded to T; NaN may count as one
// that does. Those of bfloat16 are compared as float16, which has the same order and needs no
// instruction for the absolute value. What is NaN as float16 is far beyond any limit.
template <typename T, int N>
__device__ __forceinline__ bool are_within(float limit, const uint4 (&bits)[N]) {
  if constexpr (sizeof(T) == 2) {
    const auto max = [](__half2 a, __half2 b) { return __hmax2_nan(__habs2(a), __habs2(b)); };
    const __half2 pair = reduce<__half2>(bits, max);
    const auto top = reinterpret_cast<const uint32_t&>(pair);
    const T rounded = from_acc<T>(limit);
    const uint32_t beyond = (uint32_t{reinterpret_cast<const uint16_t&>(rounded)} + 1) << 16;
    return top < beyond && top << 16 < beyond;
  } else {
    return reduce<T>(bits, [](T a, T b) { return fmax(fabs(a), fabs(b)); }) <= limit;
  }
}

// A row's classes in memory: whole aligned vectors, and edges, the elements before and after them.
template <typename T>
struct RowView {
  T* data;
  int head, n_vectors, n_edges;  // head: edges before the first vector

  __device__ RowView(T* data, int vocab_size) : data(data) {
    const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(data) % 16 / sizeof(T));
    head = min((kVector<T> - misaligned) % kVector<T>, vocab_size);
    n_vectors = (vocab_size - head) / kVector<T>;
    n_edges = vocab_size - n_vectors * kVector<T>;
  }
  __device__ void use_no_vectors() {
    head = n_edges = n_edges + n_vectors * kVector<T>;
    n_vectors = 0;
  }
  // The first class of vector v, and the class of edge i.
  __device__ int vector_class(int v) const { return head + v * kVector<T>; }
  __device__ int edge_class(int i) const { return i < head ? i : i + n_vectors * kVector<T>; }
};

}  // namespace fused_xent::cuda
