// The statistics of one thread's classes: what forward sums.
#pragma once

#include <cstdint>

#include "labels.cuh"
#include "share.cuh"

namespace fused_xent::cuda {

template <typename A>
struct NoLoss {};
template <typename A>
struct SpreadLoss {
  A lost_mass = 0, lost_dot = 0;
};

// The statistics of a thread that sweeps logits. The sum is one of Exp's powers, and `top` is the
// input logit whose z is max. The rounding errors of the labels' sums are kept: these sums have
// many terms, and their errors may all have one sign. The exponentials are added up in groups
// first. kIsUniform: dot is the sum of Exp's y.
template <typename Exp, bool kHasSpread, bool kIsUniform = false>
struct SweepStats
    : RowStats<typename Exp::Real>,
      std::conditional_t<kHasSpread, SpreadLoss<typename Exp::Real>, NoLoss<typename Exp::Real>> {
  using A = typename Exp::Real;
  typename Exp::By by;
  A top = kLowest<A>;

  __device__ explicit SweepStats(typename Exp::By by) : RowStats<A>(empty_stats<A>()), by(by) {
    this->max = max_of(top);
  }

  // Never -inf, from which no logit has a distance.
  __device__ __forceinline__ A max_of(A input) const {
    return fmax(Exp::max_of(by, input), kLowest<A>);
  }

  __device__ __forceinline__ Exp exponential() const { return Exp(by, this->max); }

  // Online softmax (Milakov and Gimelshein, https://arxiv.org/abs/1805.02867) by groups: the sum so
  // far is rescaled at most once a group, if the group has a new maximum.
  __device__ __forceinline__ void raise_max(A input) {
    if (input == top) return;
    const A max = max_of(input);
    this->sum *= exponential().to(Exp(by, max));
    if constexpr (kHasSpread && (Exp::kIsRelative || !kIsUniform)) {
      const A shift = this->max - max;
      if (this->mass != 0) add_labels(0, shift * with_lost(this->mass, this->lost_mass));
    }
    top = input;
    this->max = max;
  }
  // Adds sums of t_j and t_j * (z_j - m), or of t_j * y_j.
  __device__ __forceinline__ void add_labels(A mass, A dot) {
    if constexpr (kIsUniform) {
      this->mass += mass;
    } else {
      add_to(this->mass, this->lost_mass, mass);
    }
    add_to(this->dot, this->lost_dot, dot);
  }
  __device__ __forceinline__ RowStats<A> result() const {
    const Exp exponential = this->exponential();
    RowStats<A> stats = *this;
    stats.sum *= exponential.to_exact();
    if constexpr (kHasSpread) {
      stats.mass = with_lost(this->mass, this->lost_mass);
      stats.dot = with_lost(this->dot, this->lost_dot);
    }
    if constexpr (kIsUniform && !Exp::kIsRelative) {
      const A unit = exponential.unit(), origin = this->max * Exp::kShrink;
      stats.dot = with_lost(fma(-stats.mass, origin, unit * this->dot), unit * this->lost_dot);
      stats.dot *= 1 / Exp::kShrink;
    }
    return stats;
  }
};

// The same for a thread that may have all classes of a row: it also keeps the rounding errors of
// the sum of exponentials.
template <typename A, bool kHasSpread>
struct LongSweepStats : SweepStats<ExactShiftedExp<A, NoTransform>, kHasSpread> {
  using Base = SweepStats<ExactShiftedExp<A, NoTransform>, kHasSpread>;
  A lost_sum = 0;

  __device__ LongSweepStats() : Base(NoTransform{}) {}

  __device__ __forceinline__ void raise_max(A max) {
    if (max != this->max) lost_sum *= exp_nonpositive(this->max - max);
    Base::raise_max(max);
  }
  __device__ __forceinline__ RowStats<A> result() const {
    RowStats<A> stats = Base::result();
    stats.sum = with_lost(stats.sum, lost_sum);
    return stats;
  }
};

template <typename T, typename S>
using StatsFor = SweepStats<ExpOf<T, S>, Spread<T, S>::kExists, kIsUniform<S>>;

// Sums over a few logits of a thread. The thread adds them, not single logits, to its long sums: so
// these need fewer additions and lose less.
template <typename A>
struct GroupSums {
  A exponentials = 0, mass = 0, dot = 0;

  __device__ __forceinline__ void operator+=(const GroupSums& other) {
    exponentials += other.exponentials;
    mass += other.mass;
    dot += other.dot;
  }
};

// The sums over N logits and their labels. t: only of labels that are read.
template <typename T, typename S, typename Exp, int N>
__device__ __forceinline__ GroupSums<Acc<T>> sums_of(const Exp& exponential, Acc<T> (&x)[N],
                                                     const Acc<T> (&t)[N]) {
  using A = Acc<T>;
  GroupSums<A> sums;
  if constexpr (kReadsLabels<S>) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      sums.mass += t[i];
      if (t[i] != 0) sums.dot += t[i] * (x[i] * exponential.by.scale - exponential.max);
    }
  }
  const A sum = exponential.template exponents<kIsUniform<S>>(x);
  if constexpr (kIsUniform<S>) {
    sums.mass = N;
    sums.dot = sum;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = exponential.power(x[i]);
  sums.exponentials = sum_of(x);
  return sums;
}

template <typename T, typename S>
__device__ __forceinline__ void add_sums(StatsFor<T, S>& stats, const GroupSums<Acc<T>>& sums) {
  stats.sum += sums.exponentials;
  if constexpr (Spread<T, S>::kExists) stats.add_labels(sums.mass, sums.dot);
}

template <typename T, typename S>
__device__ __forceinline__ void add_element(StatsFor<T, S>& stats, Acc<T> x, Acc<T> t) {
  stats.raise_max(fmax(x, stats.top));
  Acc<T> one[] = {x};
  add_sums<T, S>(stats, sums_of<T, S>(stats.exponential(), one, {t}));
}

// Puts minus infinity, which adds nothing to a sum of exponentials, in the place of an element.
template <typename T, int kCount>
__device__ __forceinline__ void leave_out(uint4 (&bits)[kCount], int element) {
  const uint4 nothing = all_minus_infinity<T>();
  const uint32_t values[] = {nothing.x, nothing.y, nothing.z, nothing.w};
  constexpr int kSize = static_cast<int>(sizeof(T));
  const uint32_t of_half = (element & 1) != 0 ? 0x5410 : 0x3254;  // which bytes of a word stay
  uint32_t which = (kSize == 8 ? 3u : 1u) << (element * kSize / 4);
  asm("" : "+r"(which));  // several bits become predicates at once; else one comparison for each
#pragma unroll
  for (int u = 0; u < kCount; ++u) {
    uint32_t* words[] = {&bits[u].x, &bits[u].y, &bits[u].z, &bits[u].w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      if ((which & 1u << (4 * u + w)) == 0) continue;
      *words[w] = kSize == 2 ? __byte_perm(*words[w], values[w], of_half) : values[w];
    }
  }
}

// Takes the exponential of what leave_out has put in the place of an element out of the sum. It is
// 0 without a softcap. With one it is not, but no other exponential is less, so the sum keeps its
// digits.
template <typename T, typename S>
__device__ __forceinline__ void forget_left_out(StatsFor<T, S>& stats) {
  if constexpr (kIsCapped<S>) {
    float x[] = {-kInfinity<float>};
    stats.exponential().exponents(x);
    stats.sum -= stats.exponential().power(x[0]);
  }
}

// Adds the group that begins with vector v, and returns whether it is small. Vectors beyond the
// share's end are minus infinity.
template <typename T, typename S>
__device__ __forceinline__ bool add_vectors(StatsFor<T, S>& stats, const uint4 (&bits)[kUnroll<S>],
                                            const RowView<const T>& view,
                                            const Spread<T, S>& spread, const ShareFor<S>& share,
                                            int v) {
  using A = Acc<T>;
  stats.raise_max(fmax(stats.top, greatest<T>(bits)));
  GroupSums<A> sums;
  const auto add = [&](const auto& exponential, uint4 vector, int w) {
    A x[kVector<T>], t[kVector<T>];
    unpack<T>(vector, x);
    if constexpr (kReadsLabels<S>) spread.vector(view.vector_class(w), t);
    sums += sums_of<T, S>(exponential, x, t);
  };
  const ExpOf<T, S> exponential = stats.exponential();
  const bool is_small = are_small<T>(exponential, bits);
  if constexpr (kIsUniform<S> || kIsCapped<S>) {
    for_vectors<T>(exponential, is_small, bits, share, v, add);
  } else {
#pragma unroll
    for (int u = 0; u < kUnroll<S>; ++u) {
      const int w = v + u * share.lanes;
      if (!kReadsLabels<S> || w < share.end) add(exponential, bits[u], w);
    }
  }
  add_sums<T, S>(stats, sums);
  return is_small;
}

// Adds every step-th edge from edge i on, without class `apart`.
template <typename T, typename S>
__device__ __forceinline__ void sweep_edges(StatsFor<T, S>& stats, const RowView<const T>& view,
                                            const Spread<T, S>& spread, int apart, int i,
                                            int step) {
  for (; i < view.n_edges; i += step) {
    const int j = view.edge_class(i);
    if (j == apart) continue;
    Acc<T> t = 0;
    if constexpr (Spread<T, S>::kExists) t = spread.at(j);
    add_element<T, S>(stats, to_acc(view.data[j]), t);
  }
}

}  // namespace fused_xent::cuda
