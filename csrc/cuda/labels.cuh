// A row's labels, its results and the factors of its gradient: everything but loops over classes.
#pragma once

#include <cstdint>

#include "../xent_rows.h"
#include "launch.h"
#include "memory.cuh"
#include "transform.cuh"

namespace fused_xent::cuda {

// By default the target of a row that is ignored or does not exist.
struct Target {
  int index = -1;          // -1: probabilities, or a row that is not read
  bool is_ignored = true;  // or of token weight 0
  bool is_bad = false;     // no class

  __device__ bool is_read() const { return !is_ignored && !is_bad; }
};

__device__ __forceinline__ bool has_no_weight(const Params& p, int64_t row) {
  if (p.token_weight == nullptr) return false;
  return p.dtype == DType::float64 ? token_weight<double>(p, row) == 0
                                   : token_weight<float>(p, row) == 0;
}

__device__ __forceinline__ Target read_target(const Params& p, int64_t row) {
  if (has_no_weight(p, row)) return {};
  if (!has_indices(p)) return {-1, false, false};
  const int64_t index = target_index(p, row);
  if (index == p.ignore_index) return {};
  const bool is_bad = index < 0 || index >= p.vocab_size;
  return {is_bad ? -1 : static_cast<int>(index), false, is_bad};
}

template <typename T>
__device__ __forceinline__ T* row_of(const void* data, const Layout& layout, int64_t row) {
  return const_cast<T*>(static_cast<const T*>(data)) + row_offset<uint32_t>(layout, row);
}

template <typename A>
__device__ __forceinline__ Smoothing<A> smoothing_of(const Arguments& a) {
  if constexpr (std::is_same_v<A, double>) {
    return a.smoothing;
  } else {
    return a.smoothing_float;
  }
}

template <typename A>
__device__ __forceinline__ RowLabels<A> labels_of_row(const Arguments& a, int64_t row, int target) {
  return labels_of(a, smoothing_of<A>(a), row, target);
}

// The labels t_j of ../xent_math.h. S is the type of what is read: of the probabilities, or the
// accumulation type for class weights. It is void or Capped if only the target has a label, and
// Uniform or UniformCapped if all are 1.
template <typename T, typename S>
struct Spread {
  using A = Acc<T>;
  static constexpr bool kExists = true;
  const S* t;  // of class 0; null: all are 0
  int64_t class_stride;
  const A* weight;  // null: all are 1
  A scale, offset;

  __device__ Spread(const Arguments& p, int64_t row) {
    const bool probabilities = !has_indices(p);
    t = probabilities ? row_of<S>(p.target, p.target_layout, row) : static_cast<const S*>(p.weight);
    class_stride = probabilities ? p.target_layout.class_stride : 1;
    weight = probabilities ? static_cast<const A*>(p.weight) : nullptr;
    const Smoothing<A> smoothing = smoothing_of<A>(p);
    scale = probabilities ? smoothing.keep : A(1);
    offset = !probabilities ? A(t == nullptr) : smoothing.uniform;
  }

  __device__ __forceinline__ A smooth(A value, int j) const {
    value = value * scale + offset;
    return weight == nullptr ? value : value * weight[j];
  }
  __device__ __forceinline__ A at(int j) const {
    return smooth(t == nullptr ? A(0) : to_acc(t[j * class_stride]), j);
  }
  // Those of a vector of logits, read one by one if they are not aligned like the logits.
  __device__ __forceinline__ void vector(int j, A (&values)[kVector<T>]) const {
    constexpr int kN = kVector<S>;
    const bool is_aligned = is_vector_aligned(t + j);
#pragma unroll
    for (int begin = 0; begin < kVector<T>; begin += kN) {
      Acc<S> read[kN] = {};
      if (t != nullptr && is_aligned) unpack<S>(load_vector_cached(t + j + begin), read);
#pragma unroll
      for (int i = 0; i < kN; ++i) {
        if (t != nullptr && !is_aligned) read[i] = to_acc(t[j + begin + i]);
        values[begin + i] = smooth(read[i], j + begin + i);
      }
    }
  }
};

template <typename T>
struct Spread<T, Uniform> {
  using A = Acc<T>;
  static constexpr bool kExists = true;
  __device__ Spread(const Params&, int64_t) {}
  __device__ __forceinline__ A at(int) const { return 1; }
  __device__ __forceinline__ void vector(int, A (&values)[kVector<T>]) const {
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) values[i] = 1;
  }
};

template <typename T>
struct Spread<T, UniformCapped> : Spread<T, Uniform> {
  using Spread<T, Uniform>::Spread;
};

template <typename T>
struct Spread<T, void> {
  static constexpr bool kExists = false;
  __device__ Spread(const Params&, int64_t) {}
};

template <typename T>
struct Spread<T, Capped> : Spread<T, void> {
  using Spread<T, void>::Spread;
};

// The value that a row's loss and gradient have if its logits are not read.
template <typename A>
__device__ __forceinline__ A unread_value(const Target& target) {
  return target.is_bad ? kNaN<A> : A(0);
}

// The class that sweeps leave out of a row's stats, if not -1: see add_class.
__device__ __forceinline__ int class_apart(const Params& p, int target) {
  return has_spread(p) ? -1 : target;
}

// stats: RowStats or FullStats of all classes but class_apart, which this adds.
template <typename A, typename Stats>
__device__ __forceinline__ RowResults<A> results_of_row(const Arguments& a, int64_t row, int target,
                                                        A target_logit, Stats& stats) {
  const int apart = class_apart(a, target);
  const A log_sum = apart < 0 ? log_sum_of(stats) : add_class(stats, target_logit, apart);
  const RowLabels<A> labels = labels_of_row<A>(a, row, target);
  RowResults<A> results = plain_results<A>(a, row, labels, target_logit, stats, log_sum);
  apply_options(a, row, labels, stats.mass, results);
  if constexpr (std::is_same_v<Stats, FullStats<A>>) results.entropy = entropy_of(stats, log_sum);
  return results;
}

// Every forward kernel calls this first; one thread writes.
__device__ __forceinline__ void write_unread_total_weight(const Arguments& a) {
  const bool is_first = (threadIdx.x | blockIdx.x | blockIdx.y) == 0;
  if (is_first && a.unread_total_weight != nullptr) *a.unread_total_weight = 0;
}

// What every row's upstream gradient is multiplied by. Kernels call this once, at their beginning:
// the division is a function call, around which the registers of a row would have to be saved.
template <typename A>
__device__ __forceinline__ A upstream_scale(const Arguments& a) {
  const A scale = static_cast<A>(a.grad_scale);
  if (a.total_weight == nullptr) return scale;
  // unit keeps great total weights in a float's range.
  const double total_weight = *a.total_weight;
  const A unit = fabs(total_weight) > 1e30 ? A(0x1p-64) : A(1);
  const A divisor = static_cast<A>(total_weight * unit);
  return divisor == 0 ? kNaN<A> : scale / divisor * unit;
}

template <typename A>
__device__ __forceinline__ A grad_loss_of(const Params& p, A scale, int64_t row) {
  if (p.grad_loss == nullptr) return scale;
  return static_cast<const A*>(p.grad_loss)[row * p.grad_loss_stride] * scale;
}

// The sum of all t_j: for class indices, of the class weights.
template <typename A>
__device__ __forceinline__ A mass_of(const Arguments& a, A mass) {
  if (!has_indices(a)) return mass;
  return a.weight_sum_on_device == nullptr ? static_cast<A>(a.vocab_size)
                                           : static_cast<A>(*a.weight_sum_on_device);
}

// A row's gradient without per-class options.
template <typename A>
struct RowBackward : RowGradient<A> {
  A at_target;
};

// at_target is 0 unless it is wanted.
template <typename A>
__device__ __forceinline__ RowBackward<A> backward_of_row(const Arguments& a, A scale, int64_t row,
                                                          int target, const RowResults<A>& results,
                                                          bool wants_target, A target_logit) {
  const Upstream<A> upstream = upstream_of(a, row, grad_loss_of(a, scale, row), results);
  const RowLabels<A> labels = labels_of_row<A>(a, row, target);
  const A mass = mass_of(a, results.mass);
  const A at_target =
      wants_target ? gradient_at_target(upstream, labels, mass, results, target_logit) : A(0);
  return {gradient_of_row(upstream, labels, mass, results), at_target};
}

}  // namespace fused_xent::cuda
