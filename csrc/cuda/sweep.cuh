// The loops over a row's classes, for one of the threads that share it.
#pragma once

#include <cstdint>

#include "labels.cuh"
#include "memory.cuh"
#include "team.cuh"

namespace fused_xent::cuda {

// Vectors that a thread reads before it uses the first. Labels on all classes are read beside them.
template <typename S>
constexpr int kUnroll = std::is_void_v<S> ? 4 : 2;

// The share of a thread: of vectors [begin, end) every step-th from begin + rank on, and every
// step-th of the elements that are in no vector.
struct Share {
  int begin, end, rank, step;
  int edge_rank, edge_step;

  // Part `part` of `parts` of a row.
  __device__ Share(const Team& team, int n_vectors, int part, int parts) {
    const int per_part = (n_vectors + parts - 1) / parts;
    begin = min(part * per_part, n_vectors);
    end = min(begin + per_part, n_vectors);
    rank = team.rank();
    step = team.size();
    edge_rank = rank + part * step;
    edge_step = step * parts;
  }

  // Whether this thread has class j; false for -1.
  template <typename T>
  __device__ bool owns(const RowView<T>& view, int j) const {
    const int after = j - view.head, v = after / kVector<T>;
    if (j >= 0 && (after < 0 || v >= view.n_vectors)) {
      return (after < 0 ? j : j - view.n_vectors * kVector<T>) % edge_step == edge_rank;
    }
    return j >= 0 && begin <= v && v < end && ((v - begin) & (step - 1)) == rank;
  }
};

// ---- forward ---------------------------------------------------------------------------------

// sum + value, and what rounding it loses (Knuth's two-sum) in lost.
template <typename A>
__device__ __forceinline__ void add_to(A& sum, A& lost, A value) {
  const A total = sum + value, added = total - sum;
  lost += (sum - (total - added)) + (value - added);
  sum = total;
}

// What a sum lost is no number where it is not finite.
template <typename A>
__device__ __forceinline__ A with_lost(A sum, A lost) {
  return lost - lost == 0 ? sum + lost : sum;
}

template <typename A>
struct NoLoss {};
template <typename A>
struct SpreadLoss {
  A lost_mass = 0, lost_dot = 0;
};

// A thread's statistics while it sweeps. A label on all classes makes sums of as many terms, whose
// roundings may all go one way; the exponentials are added up in groups first.
template <typename A, bool kHasSpread>
struct SweepStats : RowStats<A>, std::conditional_t<kHasSpread, SpreadLoss<A>, NoLoss<A>> {
  __device__ SweepStats() : RowStats<A>(empty_stats<A>()) {}

  // Online softmax (Milakov and Gimelshein, https://arxiv.org/abs/1805.02867) by groups: the sum so
  // far is rescaled when a group has a new maximum, and no more than once a group.
  __device__ __forceinline__ void raise_max(A max) {
    if (max == this->max) return;
    const A shift = this->max - max;
    this->sum *= exp_nonpositive(shift);
    if constexpr (kHasSpread) {
      if (this->mass != 0) add_labels(0, shift * with_lost(this->mass, this->lost_mass));
    }
    this->max = max;
  }
  // Sums of t_j and t_j * (x_j - m).
  __device__ __forceinline__ void add_labels(A mass, A dot) {
    add_to(this->mass, this->lost_mass, mass);
    add_to(this->dot, this->lost_dot, dot);
  }
  __device__ __forceinline__ RowStats<A> result() const {
    if constexpr (!kHasSpread)
      return *this;
    else
      return {this->max, this->sum, with_lost(this->mass, this->lost_mass),
              with_lost(this->dot, this->lost_dot)};
  }
};

template <bool kHasSpread, typename A>
__device__ __forceinline__ void add_element(SweepStats<A, kHasSpread>& stats, A x, A t) {
  stats.raise_max(fmax(x, stats.max));
  const A shifted = x - stats.max;
  stats.sum += exp_nonpositive(shifted);
  if constexpr (kHasSpread) stats.add_labels(t, t == 0 ? A(0) : t * shifted);
}

template <typename T, typename S>
using StatsFor = SweepStats<Acc<T>, Spread<T, S>::kExists>;

// Adds vectors first, first + step, ... below end; of those beyond, bits are minus infinity.
template <typename T, typename S>
__device__ __forceinline__ void add_vectors(StatsFor<T, S>& stats, const uint4 (&bits)[kUnroll<S>],
                                            const RowView<const T>& view,
                                            const Spread<T, S>& spread, int first, int step,
                                            int end) {
  using A = Acc<T>;
  uint4 top = bits[0];
#pragma unroll
  for (int u = 1; u < kUnroll<S>; ++u) top = max_of<T>(top, bits[u]);
  A x[kVector<T>];
  unpack<T>(top, x);
  A max = stats.max;
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) max = fmax(max, x[i]);
  stats.raise_max(max);
#pragma unroll
  for (int u = 0; u < kUnroll<S>; ++u) {
    unpack<T>(bits[u], x);
    A sum = 0;
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) sum += exp_nonpositive(x[i] - max);
    stats.sum += sum;
    if constexpr (Spread<T, S>::kExists) {
      const int v = first + u * step;
      if (v >= end) continue;
      A t[kVector<T>], mass = 0, dot = 0;
      spread.vector(view.vector_class(v), t);
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) {
        mass += t[i];
        if (t[i] != 0) dot += t[i] * (x[i] - max);
      }
      stats.add_labels(mass, dot);
    }
  }
}

template <typename T, typename S>
__device__ __forceinline__ void sweep_edges(StatsFor<T, S>& stats, const RowView<const T>& view,
                                            const Spread<T, S>& spread, const Share& share) {
  for (int i = share.edge_rank; i < view.n_edges; i += share.edge_step) {
    const int j = view.edge_class(i);
    Acc<T> t = 0;
    if constexpr (Spread<T, S>::kExists) t = spread.at(j);
    add_element(stats, to_acc(view.data[j]), t);
  }
}

// read(k, v) gives the k-th vector of this thread's, which is the row's v-th.
template <typename T, typename S, typename Read>
__device__ __forceinline__ void sweep_vectors(StatsFor<T, S>& stats, const RowView<const T>& view,
                                              const Spread<T, S>& spread, const Share& share,
                                              const Read& read) {
  int k = 0;
  for (int v = share.begin + share.rank; v < share.end; v += kUnroll<S> * share.step) {
    uint4 bits[kUnroll<S>];
#pragma unroll
    for (int u = 0; u < kUnroll<S>; ++u) {
      const int at = v + u * share.step;
      bits[u] = at < share.end ? read(k + u, at) : all_minus_infinity<T>();
    }
    add_vectors(stats, bits, view, spread, v, share.step, share.end);
    k += kUnroll<S>;
  }
}

// ---- backward --------------------------------------------------------------------------------

// Either the gradient of the logits, or, to scale one, its product with the upstream gradient.
template <typename T, typename S, int kCount = kUnroll<S>>
struct GradientOf {
  using A = Acc<T>;
  static constexpr int kUnrolled = kCount;
  const RowGradient<A>& row;
  const Spread<T, S>& spread;

  __device__ __forceinline__ A element(A x, int j) const {
    A value = row.at(x);
    if constexpr (Spread<T, S>::kExists) value -= spread.at(j) * row.spread;
    return value;
  }
  __device__ __forceinline__ uint4 vector(uint4 bits, int j) const {
    A x[kVector<T>];
    unpack<T>(bits, x);
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) x[i] = row.at(x[i]);
    if constexpr (Spread<T, S>::kExists) {
      A t[kVector<T>];
      spread.vector(j, t);
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) x[i] -= t[i] * row.spread;
    }
    return pack<T>(x);
  }
};

template <typename T>
struct ScaledBy {
  using A = Acc<T>;
  static constexpr int kUnrolled = 4;
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

// The vectors that a thread reads at a time, from its k-th on, which is the row's v-th.
template <int kCount, typename Read>
__device__ __forceinline__ void read_vectors(uint4 (&bits)[kCount], const Share& share, int k,
                                             int v, const Read& read) {
#pragma unroll
  for (int u = 0; u < kCount; ++u) {
    const int at = v + u * share.step;
    if (at < share.end) bits[u] = read(k + u, at);
  }
}

// read as above. bits: the first vectors, read before; out may be the logits.
template <typename T, typename Values, typename Read>
__device__ __forceinline__ void write_vectors(T* out, const RowView<const T>& view,
                                              const Values& values, const Share& share,
                                              uint4 (&bits)[Values::kUnrolled], const Read& read) {
  constexpr int kCount = Values::kUnrolled;
  int k = 0;
  for (int v = share.begin + share.rank; v < share.end;) {
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const int at = v + u * share.step, j = view.vector_class(at);
      if (at < share.end) store_vector(out + j, values.vector(bits[u], j));
    }
    k += kCount;
    v += kCount * share.step;
    read_vectors(bits, share, k, v, read);
  }
}

template <typename T, typename Values>
__device__ __forceinline__ void write_edges(T* out, const RowView<const T>& view,
                                            const Values& values, const Share& share) {
  for (int i = share.edge_rank; i < view.n_edges; i += share.edge_step) {
    const int j = view.edge_class(i);
    out[j] = from_acc<T>(values.element(to_acc(view.data[j]), j));
  }
}

// The logits of a row whose results go to `out`, and whose labels are read beside them: in vectors
// only where all are aligned together.
template <typename T, typename S>
__device__ __forceinline__ RowView<const T> view_for(const T* logits, const T* out,
                                                     const Spread<T, S>& spread, int vocab_size) {
  RowView<const T> view(logits, vocab_size);
  const uintptr_t apart = reinterpret_cast<uintptr_t>(logits) - reinterpret_cast<uintptr_t>(out);
  if (apart % 16 != 0 || !spread.has_vectors_at(view.head)) {
    view.head = view.n_edges = vocab_size;
    view.n_vectors = 0;
  }
  return view;
}

template <typename T>
struct ReadGlobal {
  const RowView<const T>& view;
  __device__ __forceinline__ uint4 operator()(int, int v) const {
    return load_vector(view.data + view.vector_class(v));
  }
};

// A whole gradient row of one value, without a look at the logits.
template <typename T>
__device__ __forceinline__ void fill_row(T* out, int vocab_size, Acc<T> value, const Team& team,
                                         int part, int parts) {
  const RowView<T> view(out, vocab_size);
  const Share share(team, view.n_vectors, part, parts);
  Acc<T> values[kVector<T>];
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) values[i] = value;
  const uint4 bits = pack<T>(values);
  for (int v = share.begin + share.rank; v < share.end; v += share.step) {
    store_vector(out + view.vector_class(v), bits);
  }
  for (int i = share.edge_rank; i < view.n_edges; i += share.edge_step) {
    out[view.edge_class(i)] = from_acc<T>(value);
  }
}

}  // namespace fused_xent::cuda
