// A row's labels, its results and the factors of its gradient: all that is not a loop over classes.
#pragma once

#include <cstdint>

#include "../xent_math.h"
#include "launch.h"
#include "memory.cuh"

namespace fused_xent::cuda {

__device__ __forceinline__ bool has_indices(const Params& p) {
  return p.target_kind != TargetKind::probabilities;
}

struct Target {
  int index;                // -1: of probabilities, or of a row without a gradient
  bool is_ignored, is_bad;  // ignored: or of token weight 0
};

template <typename A>
__device__ __forceinline__ A token_weight(const Params& p, int64_t row) {
  return p.token_weight == nullptr ? A(1) : static_cast<const A*>(p.token_weight)[row];
}

__device__ __forceinline__ bool has_no_weight(const Params& p, int64_t row) {
  if (p.token_weight == nullptr) return false;
  return p.dtype == DType::float64 ? token_weight<double>(p, row) == 0
                                   : token_weight<float>(p, row) == 0;
}

__device__ __forceinline__ Target read_target(const Params& p, int64_t row) {
  if (has_no_weight(p, row)) return {-1, true, false};
  if (!has_indices(p)) return {-1, false, false};
  int64_t index;
  if (p.target_kind == TargetKind::int64) {
    index = static_cast<const int64_t*>(p.target)[row];
  } else if (p.target_kind == TargetKind::int32) {
    index = static_cast<const int32_t*>(p.target)[row];
  } else {
    index = static_cast<const uint8_t*>(p.target)[row];
  }
  if (index == p.ignore_index) return {-1, true, false};
  const bool is_bad = index < 0 || index >= p.vocab_size;
  return {is_bad ? -1 : static_cast<int>(index), false, is_bad};
}

// row_offset of ../xent_params.h, by divisions of 32 bits.
template <typename T>
__device__ __forceinline__ T* row_of(const void* data, const Layout& layout, int64_t row) {
  auto rest = static_cast<uint32_t>(row);
  int64_t offset = 0;
#pragma unroll 1
  for (int d = layout.n_dims - 1; d > 0; --d) {
    const auto size = static_cast<uint32_t>(layout.size[d]);
    offset += rest % size * layout.stride[d];
    rest /= size;
  }
  return const_cast<T*>(static_cast<const T*>(data)) + offset + rest * layout.stride[0];
}

template <typename A>
__device__ __forceinline__ A class_weight(const Params& p, int j) {
  return p.weight == nullptr ? A(1) : static_cast<const A*>(p.weight)[j];
}

template <typename A>
__device__ __forceinline__ A keep_of(const Arguments& a) {
  if constexpr (std::is_same_v<A, double>)
    return a.keep;
  else
    return a.keep_float;
}
template <typename A>
__device__ __forceinline__ A uniform_of(const Arguments& a) {
  if constexpr (std::is_same_v<A, double>)
    return a.uniform;
  else
    return a.uniform_float;
}

// on_target and spread of ../xent_math.h.
template <typename A>
__device__ __forceinline__ A on_target_of(const Arguments& p, int target) {
  return target < 0 ? A(0) : keep_of<A>(p) * class_weight<A>(p, target);
}
template <typename A>
__device__ __forceinline__ A spread_of(const Arguments& p) {
  return has_indices(p) ? uniform_of<A>(p) : A(1);
}

// t_j of ../xent_math.h. S is the type it is read in: that of the probabilities, the accumulation
// type for class weights, or void where there is no spread.
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
    scale = probabilities ? keep_of<A>(p) : A(1);
    offset = !probabilities ? A(t == nullptr) : uniform_of<A>(p);
  }

  __device__ __forceinline__ A smooth(A value, int j) const {
    value = value * scale + offset;
    return weight == nullptr ? value : value * weight[j];
  }
  __device__ __forceinline__ A at(int j) const {
    return smooth(t == nullptr ? A(0) : to_acc(t[j * class_stride]), j);
  }
  // Whether vector() can be had at j, and every kVector<T> classes from there.
  __device__ __forceinline__ bool has_vectors_at(int j) const {
    return t == nullptr || is_vector_aligned(t + j);
  }
  __device__ __forceinline__ void vector(int j, A (&values)[kVector<T>]) const {
    constexpr int kN = kVector<S>;
#pragma unroll
    for (int begin = 0; begin < kVector<T>; begin += kN) {
      Acc<S> read[kN] = {};
      if (t != nullptr) unpack<S>(load_vector(t + j + begin), read);
#pragma unroll
      for (int i = 0; i < kN; ++i) values[begin + i] = smooth(read[i], j + begin + i);
    }
  }
};

template <typename T>
struct Spread<T, void> {
  static constexpr bool kExists = false;
  __device__ Spread(const Params&, int64_t) {}
  __device__ __forceinline__ bool has_vectors_at(int) const { return true; }
};

// ---- what forward leaves ---------------------------------------------------------------------

template <typename A>
struct RowResults {
  A loss, max, log_sum, mass, slope;  // mass: of probabilities; slope: of the focal loss
};

template <typename A>
__device__ __forceinline__ void write_row(const Params& p, int64_t row, const RowResults<A>& r) {
  const auto write = [=](void* values, A value) {
    if (values != nullptr) static_cast<A*>(values)[row] = value;
  };
  write(p.row_loss, r.loss);
  write(p.row_max, r.max);
  write(p.log_sum, r.log_sum);
  write(p.label_mass, r.mass);
  write(p.loss_slope, r.slope);
}

template <typename A>
__device__ __forceinline__ void write_statistics(const Params& p, int64_t row, A entropy,
                                                 int64_t argmax) {
  if (p.entropy != nullptr) static_cast<A*>(p.entropy)[row] = entropy;
  if (p.argmax != nullptr) p.argmax[row] = argmax;
}

// Of a row that is ignored, or whose target is no class: that of the latter is NaN.
template <typename A>
__device__ __forceinline__ void write_unread_row(const Params& p, int64_t row, bool is_bad) {
  const A value = is_bad ? kNaN<A> : A(0);
  write_row<A>(p, row, {value, value, value, value, value});
  write_statistics<A>(p, row, value, -1);
}

template <typename A>
__device__ __forceinline__ A log_sum_of(const RowStats<A>& stats) {
  // The maximum's own term is 1, and may come out a little below.
  return 0 < stats.sum && stats.sum < 1 ? A(0) : log(stats.sum);
}

template <typename A>
__device__ __forceinline__ RowResults<A> results_of_row(const Arguments& p, int64_t row, int target,
                                                        A target_logit, const RowStats<A>& stats) {
  const A log_sum = log_sum_of(stats), on_target = on_target_of<A>(p, target);
  A loss = has_indices(p) ? index_loss(on_target, spread_of<A>(p), target_logit - stats.max,
                                       log_sum, stats.mass, stats.dot)
                          : probability_loss(log_sum, stats.mass, stats.dot);
  A slope = 1;
  if (p.focal_gamma != 0) {
    const A q = has_indices(p) ? label_mass(on_target, spread_of<A>(p), stats.mass) : stats.mass;
    const FocalLoss<A> focal = focal_loss(loss, q, static_cast<A>(p.focal_gamma));
    loss = focal.loss;
    slope = focal.slope;
  }
  if (p.lse_square_scale != 0) {
    const A lse = stats.max + log_sum;
    loss += static_cast<A>(p.lse_square_scale) * lse * lse;
  }
  return {token_weight<A>(p, row) * loss, stats.max, log_sum, stats.mass, slope};
}

// ---- what backward takes from it -------------------------------------------------------------

// What every row's upstream gradient is multiplied by. For a kernel's beginning: a division is a
// call there, around which what is in registers would have to be saved.
template <typename A>
__device__ __forceinline__ A upstream_scale(const Arguments& a) {
  const A scale = static_cast<A>(a.grad_scale);
  if (a.total_weight == nullptr) return scale;
  // In a float's range, however great the weights.
  const double total_weight = *a.total_weight;
  const A unit = fabs(total_weight) > 1e30 ? A(0x1p-64) : A(1);
  const A divisor = static_cast<A>(total_weight * unit);
  return divisor == 0 ? kNaN<A> : scale / divisor * unit;
}
template <typename A>
__device__ __forceinline__ A upstream_of(const Params& p, A scale, int64_t row) {
  if (p.grad_loss == nullptr) return scale;
  return static_cast<const A*>(p.grad_loss)[row * p.grad_loss_stride] * scale;
}

// By what forward has left of a row, or is about to. Without options, g is all there is.
template <typename A>
__device__ __forceinline__ Upstream<A> upstream_of_row(const Arguments& a, A scale, int64_t row,
                                                       const RowResults<A>& r) {
  Upstream<A> upstream{upstream_of(a, scale, row) * token_weight<A>(a, row), 0, 0};
  if (a.lse_square_scale != 0) {
    upstream.softmax = 2 * upstream.g * static_cast<A>(a.lse_square_scale) * (r.max + r.log_sum);
  }
  if (a.grad_lse != nullptr) upstream.softmax += static_cast<const A*>(a.grad_lse)[row];
  if (a.focal_gamma != 0) upstream.g *= r.slope;
  return upstream;
}

// The gradient at class j is factor * exp(x_j - max) - spread * t_j, but for the target's.
template <typename A>
struct RowGradient {
  A max, factor, spread, at_target;
};

// Of all t_j: for indices, of the class weights.
template <typename A>
__device__ __forceinline__ A mass_of(const Arguments& a, A mass) {
  if (!has_indices(a)) return mass;
  return a.weight_sum_on_device == nullptr ? static_cast<A>(a.vocab_size)
                                           : static_cast<A>(*a.weight_sum_on_device);
}

// The gradient at the target by its logit, but for what the logit is transformed by.
template <typename A>
__device__ __forceinline__ A gradient_at_target(const Arguments& a, const Upstream<A>& upstream,
                                                int target, A target_logit,
                                                const RowResults<A>& r) {
  const A d = target_logit - r.max, log_p = d - r.log_sum, p = exp(log_p);
  const A gradient =
      upstream.g * target_gradient(on_target_of<A>(a, target), spread_of<A>(a), p, expm1(log_p),
                                   mass_of(a, r.mass), class_weight<A>(a, target));
  return p == 0 ? gradient : gradient + p * (upstream.softmax + upstream.shifted * d);
}

// at_target is made only where it is wanted.
template <typename A>
__device__ __forceinline__ RowGradient<A> gradient_of_row(const Arguments& a, A scale, int64_t row,
                                                          int target, const RowResults<A>& r,
                                                          bool wants_target, A target_logit) {
  const Upstream<A> upstream = upstream_of_row(a, scale, row, r);
  const A spread = spread_of<A>(a), on_target = on_target_of<A>(a, target);
  const A q = label_mass(on_target, spread, mass_of(a, r.mass));
  const A at_target =
      wants_target ? gradient_at_target(a, upstream, target, target_logit, r) : A(0);
  return {r.max, (upstream.g * q + upstream.softmax) * exp(-r.log_sum), upstream.g * spread,
          at_target};
}

// What forward has left of a row.
template <typename A>
__device__ __forceinline__ RowResults<A> saved_results(const Arguments& a, int64_t row) {
  const auto read = [=](const void* values) {
    return values == nullptr ? A(0) : static_cast<const A*>(values)[row];
  };
  return {0, read(a.row_max), read(a.log_sum), read(a.label_mass), read(a.loss_slope)};
}

}  // namespace fused_xent::cuda
