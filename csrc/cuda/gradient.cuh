// The gradient of one thread's classes: what backward writes.
#pragma once

#include <cstdint>

#include "labels.cuh"
#include "share.cuh"

namespace fused_xent::cuda {

// What backward writes: the gradient of the logits.
template <typename T, typename S, typename Exp = ExpOf<T, S>>
struct GradientOf {
  using A = Acc<T>;
  static constexpr int kCount = kUnroll<S>;
  const Spread<T, S>& spread;
  const Exp exponential;
  const A factor, spread_factor;

  __device__ GradientOf(const RowGradient<A>& row, const Spread<T, S>& spread,
                        const Transform<A>& transform)
      : spread(spread),
        exponential(transform, row.max),
        factor(row.factor * exponential.to_exact() * common_slope(transform)),
        spread_factor(row.spread * common_slope(transform)) {}
  __device__ GradientOf(const GradientOf<T, S>& other, const Exp& exponential)
      : spread(other.spread),
        exponential(exponential),
        factor(other.factor),
        spread_factor(other.spread_factor) {}

  __device__ __forceinline__ auto small() const
    requires kIsCapped<S>
  {
    return GradientOf<T, S, SmallCappedExp>(*this, exponential.small());
  }
  __device__ __forceinline__ A most_of_small() const { return exponential.most_of_small(); }

  // Turns logits into their gradients; t: their labels.
  template <int N>
  __device__ __forceinline__ void replace(A (&x)[N], const A (&t)[N]) const {
    if constexpr (kIsCapped<S>) {
      constexpr int kAtOnce = N < 4 ? N : 4;
#pragma unroll
      for (int i = 0; i < N; i += kAtOnce) {
        auto& some = reinterpret_cast<A(&)[kAtOnce]>(x[i]);
        A slopes[kAtOnce];
        exponential.exponents(some, slopes);
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) some[k] = exponential.power(some[k]);
        if constexpr (kIsUniform<S>) {
          set_fma(some, some, factor, -spread_factor);
        } else {
          set_product(some, some, factor);
        }
        set_product(some, some, slopes);
      }
    } else {
      exponential.exponents(x);
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = exponential.power(x[i]);
      if constexpr (kReadsLabels<S>) {
        set_product(x, x, factor);
        set_fma(x, t, -spread_factor, x);
      } else if constexpr (kIsUniform<S>) {
        set_fma(x, x, factor, -spread_factor);
      } else {
        set_product(x, x, factor);
      }
    }
  }
  __device__ __forceinline__ A element(A x, int j) const {
    A values[] = {x}, t[] = {0};
    if constexpr (Spread<T, S>::kExists) t[0] = spread.at(j);
    replace(values, t);
    return values[0];
  }
  __device__ __forceinline__ uint4 vector(uint4 bits, int j) const {
    A x[kVector<T>], t[kVector<T>];
    unpack<T>(bits, x);
    if constexpr (Spread<T, S>::kExists) spread.vector(j, t);
    replace(x, t);
    return pack<T>(x);
  }

 private:
  // The slope dz/dx; with a softcap, the part of it that all classes have in common.
  static __device__ __forceinline__ A common_slope(const Transform<A>& transform) {
    return transform.scale * (kIsCapped<S> ? -4 : 1);
  }
};

// What scale_gradient writes: a gradient times the upstream gradient.
template <typename T>
struct ScaledBy {
  using A = Acc<T>;
  static constexpr int kCount = 4;
  A factor;

  __device__ __forceinline__ A element(A x, int) const { return x * factor; }
  __device__ __forceinline__ uint4 vector(uint4 bits, int) const {
    A x[kVector<T>];
    unpack<T>(bits, x);
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) x[i] *= factor;
    return pack<T>(x);
  }
};

// Writes the group that begins with vector v; is_small: see are_small.
template <typename T, typename Values>
__device__ __forceinline__ void write_vectors(T* out, const RowView<const T>& view,
                                              const Values& values,
                                              const Share<Values::kCount>& share, int v,
                                              const uint4 (&bits)[Values::kCount], bool is_small) {
  for_vectors<T>(values, is_small, bits, share, v, [&](const auto& values, uint4 vector, int w) {
    const int j = view.vector_class(w);
    store_vector_cached(out + j, values.vector(vector, j));
  });
}

template <typename T, typename Values>
__device__ __forceinline__ void write_edges(T* out, const RowView<const T>& view,
                                            const Values& values, int i, int step) {
  for (; i < view.n_edges; i += step) {
    const int j = view.edge_class(i);
    out[j] = from_acc<T>(values.element(to_acc(view.data[j]), j));
  }
}

// The logits of a row whose gradient is written to `out`. It has vectors only if those of both are
// aligned, as in new gradients (empty_gradient in ../binding/layout.cpp) and in place.
template <typename T>
__device__ __forceinline__ RowView<const T> view_for(const T* logits, const T* out,
                                                     int vocab_size) {
  RowView<const T> view(logits, vocab_size);
  const uintptr_t apart = reinterpret_cast<uintptr_t>(logits) - reinterpret_cast<uintptr_t>(out);
  if (apart % 16 != 0) view.use_no_vectors();
  return view;
}

// Writes one value to a whole gradient row, without reading the logits.
template <typename T, typename AnyTeam>
__device__ __forceinline__ void fill_row(T* out, int vocab_size, Acc<T> value,
                                         const AnyTeam& team) {
  const RowView<T> view(out, vocab_size);
  const Share<1> share(team, view.n_vectors);
  Acc<T> values[kVector<T>];
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) values[i] = value;
  const uint4 bits = pack<T>(values);
  for (int v = share.first; v < share.end; v += share.step) {
    store_vector(out + view.vector_class(v), bits);
  }
  for (int i = share.edge_rank; i < view.n_edges; i += share.edge_step) {
    out[view.edge_class(i)] = from_acc<T>(value);
  }
}

}  // namespace fused_xent::cuda
