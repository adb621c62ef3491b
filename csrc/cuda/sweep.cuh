// The loops over a row's classes, for one of the threads that share it.
#pragma once

#include <cstdint>

#include "labels.cuh"
#include "memory.cuh"
#include "team.cuh"

namespace fused_xent::cuda {

// A group: the vectors that a thread reads before it uses the first. Labels may be read beside the
// logits.
template <typename S>
constexpr int kUnroll = kReadsLabels<S> ? 2 : 4;

// Where a thread has a class: as an element of the group that begins with a vector, or in no group,
// as an edge.
struct Place {
  bool is_mine = false;
  int group = -1, element = 0;
};

// The share of a thread in its team's part of a row: groups of kCount vectors, and every
// edge_step-th of the edges, the elements that are in no vector. The `lanes` neighbouring threads
// of a team in a warp have neighbouring vectors, so that their groups together are one piece of the
// row.
template <int kCount>
struct Share {
  int first, end;   // the thread's first vector; the part's end
  int whole_end;    // the end of the vectors with which a whole group begins
  int lanes, step;  // from one vector of a group to the next; from one group to the next
  int edge_rank, edge_step;

  template <typename AnyTeam>
  __device__ Share(const AnyTeam& team, int n_vectors) {
    const int part = team.part(), parts = team.parts();
    int begin = 0;
    end = n_vectors;
    if (parts > 1) {
      const int per_part = ((n_vectors + parts - 1) / parts + kWarp - 1) / kWarp * kWarp;
      begin = min(part * per_part, n_vectors);
      end = min(begin + per_part, n_vectors);
    }
    const int lane = team.lane();
    lanes = team.lanes();
    first = begin + (team.rank() - lane) * kCount + lane;
    step = team.size() * kCount;
    // A group of four counts as whole only if it is whole for all lanes of the team, so that they
    // take the same branch.
    whole_end = kCount < 4 ? end - (kCount - 1) * lanes : end + lane + 1 - kCount * lanes;
    asm("" : "+r"(whole_end));  // keeps it in a register: else it is computed for each group
    edge_rank = team.rank() + part * team.size();
    edge_step = team.size() * parts;
  }

  __device__ __forceinline__ bool is_whole(int v) const { return v < whole_end; }

  // Where class j is; nowhere for -1.
  template <typename T>
  __device__ Place find(const RowView<T>& view, int j) const {
    if (j < 0) return {};
    const int after = j - view.head, v = after / kVector<T>;
    if (after < 0 || v >= view.n_vectors) {
      const int i = after < 0 ? j : j - view.n_vectors * kVector<T>;
      return {i % edge_step == edge_rank, -1, 0};
    }
    const int in_group = (v - first) & (step - 1);
    if (v < first || v >= end || in_group >= kCount * lanes) return {};
    if ((in_group & (lanes - 1)) != 0) return {};
    return {true, v - in_group, in_group / lanes * kVector<T> + after % kVector<T>};
  }

  // Reads the group that begins with vector v < end. read(u, w) returns its u-th vector, which is
  // the row's w-th.
  template <typename T, typename Read>
  __device__ __forceinline__ void read(uint4 (&bits)[kCount], int v, const Read& read) const {
    if (is_whole(v)) {
#pragma unroll
      for (int u = 0; u < kCount; ++u) bits[u] = read(u, v + u * lanes);
    } else {
#pragma unroll
      for (int u = 0; u < kCount; ++u) {
        const int w = v + u * lanes;
        bits[u] = w < end ? read(u, w) : all_minus_infinity<T>();
      }
    }
  }
  // Calls body(u, w) for each of them.
  template <typename Body>
  __device__ __forceinline__ void for_vectors(int v, const Body& body) const {
    if (is_whole(v)) {
#pragma unroll
      for (int u = 0; u < kCount; ++u) body(u, v + u * lanes);
    } else {
#pragma unroll
      for (int u = 0; u < kCount; ++u) {
        if (v + u * lanes < end) body(u, v + u * lanes);
      }
    }
  }
};

// Calls body(of, bits[u], w) for the vectors of the group that begins with vector v, of which the
// u-th is the row's w-th. `of` knows exponentials. If it has faster ones for small logits, those of
// any logits are rare: their loop is not unrolled, to be short. Minus infinity, which stands for
// the vectors beyond the share's end, is never small.
template <typename T, typename Of, int kCount, typename Body>
__device__ __forceinline__ void for_vectors(const Of& of, const uint4 (&bits)[kCount],
                                            const Share<kCount>& share, int v, const Body& body) {
  if constexpr (requires { of.small(); }) {
    if (are_within<T>(of.most_of_small(), bits)) {
#pragma unroll
      for (int u = 0; u < kCount; ++u) body(of.small(), bits[u], v + u * share.lanes);
      return;
    }
    uint4 left[kCount];
#pragma unroll
    for (int u = 0; u < kCount; ++u) left[u] = bits[u];
    const int end = min(v + kCount * share.lanes, share.end);
#pragma unroll 1
    for (int w = v; w < end; w += share.lanes) {
      body(of, left[0], w);
#pragma unroll
      for (int u = 1; u < kCount; ++u) left[u - 1] = left[u];
    }
  } else {
    share.for_vectors(v, [&](int u, int w) { body(of, bits[u], w); });
  }
}

// ---- forward ---------------------------------------------------------------------------------

template <typename A>
struct NoLoss {};
template <typename A>
struct SpreadLoss {
  A lost_mass = 0, lost_dot = 0;
};

// The statistics of a thread that sweeps logits; the sum is that of Exp, and `top` is the input
// logit of max. Labels on all classes have sums of many terms, whose rounding errors may all have
// one sign, so they are kept. The exponentials are added up in groups first. kIsUniform: dot is the
// sum of Exp's y.
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
template <typename S>
using ShareFor = Share<kUnroll<S>>;

// Sums over some logits of a thread, which are small: the long sums lose less in fewer additions.
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

// Takes what leave_out has put in the place of an element out of the sum. With a softcap it is not
// 0, but no other element's exponential is less.
template <typename T, typename S>
__device__ __forceinline__ void forget_left_out(StatsFor<T, S>& stats) {
  if constexpr (kIsCapped<S>) {
    float x[] = {-kInfinity<float>};
    stats.exponential().exponents(x);
    stats.sum -= stats.exponential().power(x[0]);
  }
}

// Adds the group that begins with vector v. Vectors beyond the share's end are minus infinity.
template <typename T, typename S>
__device__ __forceinline__ void add_vectors(StatsFor<T, S>& stats, const uint4 (&bits)[kUnroll<S>],
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
  if constexpr (kIsUniform<S>) {
    for_vectors<T>(exponential, bits, share, v, add);
  } else {
#pragma unroll
    for (int u = 0; u < kUnroll<S>; ++u) {
      const int w = v + u * share.lanes;
      if (!kReadsLabels<S> || w < share.end) add(exponential, bits[u], w);
    }
  }
  add_sums<T, S>(stats, sums);
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

// ---- backward --------------------------------------------------------------------------------

// What backward writes: the gradient of the logits.
template <typename T, typename S, typename Exp = ExpOf<T, S>>
struct GradientOf {
  using A = Acc<T>;
  static constexpr int kCount = kUnroll<S>;
  const Spread<T, S>& spread;
  const Exp exponential;
  const A factor, spread_factor;

  // The slope dz/dx, or the part of it that all classes have in common.
  __device__ GradientOf(const RowGradient<A>& row, const Spread<T, S>& spread,
                        const Transform<A>& transform)
      : spread(spread),
        exponential(transform, row.max),
        factor(row.factor * exponential.to_exact() * (transform.scale * (kIsCapped<S> ? -4 : 1))),
        spread_factor(row.spread * (transform.scale * (kIsCapped<S> ? -4 : 1))) {}
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
        set_fma(some, some, factor, -spread_factor);
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

// Writes the group that begins with vector v.
template <typename T, typename Values>
__device__ __forceinline__ void write_vectors(T* out, const RowView<const T>& view,
                                              const Values& values,
                                              const Share<Values::kCount>& share, int v,
                                              const uint4 (&bits)[Values::kCount]) {
  for_vectors<T>(values, bits, share, v, [&](const auto& values, uint4 vector, int w) {
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
// aligned, as in new gradients (empty_gradient in ../binding/tensors.cpp) and in place.
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
