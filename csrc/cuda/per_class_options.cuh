// The statistics and the gradient of one thread's classes with per-class options (see is_general):
// transformed logits, the statistics entropy and argmax, and the gradient of the entropy.
#pragma once

#include "sweep.cuh"
#include "transform.cuh"

namespace fused_xent::cuda {

// FullStats, with the rounding errors of all sums.
template <typename A>
struct GeneralStats : LongSweepStats<A, true> {
  using Base = LongSweepStats<A, true>;
  A moment = 0, lost_moment = 0, top = -kInfinity<A>;
  int argmax = -1;

  // Adds N classes j at once: their transformed logits z, and their labels t. Classes that do not
  // exist come last and have z = -inf.
  template <int N>
  __device__ __forceinline__ void add(const A (&z)[N], const A (&t)[N], const int (&j)[N]) {
    A max = this->max, sums[4] = {0, 0, 0, 0};
    bool may_be_top = argmax < 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      max = fmax(max, z[i]);
      may_be_top |= !(z[i] < top);
    }
    raise_max(max);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const A d = z[i] - max, e = exp_nonpositive(d);
      sums[0] += e;
      if (e != 0) sums[1] += e * d;
      sums[2] += t[i];
      if (t[i] != 0) sums[3] += t[i] * d;
    }
    add_to(this->sum, this->lost_sum, sums[0]);
    add_to(moment, lost_moment, sums[1]);
    this->add_labels(sums[2], sums[3]);
    if (!may_be_top) return;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (!is_above(result(), z[i], j[i])) continue;
      top = z[i];
      argmax = j[i];
    }
  }
  __device__ __forceinline__ FullStats<A> result() const {
    return {Base::result(), with_lost(moment, lost_moment), top, argmax};
  }

 private:
  __device__ __forceinline__ void raise_max(A max) {
    if (max == this->max) return;
    const A shift = this->max - max, factor = exp_nonpositive(shift);
    moment = with_lost(moment, lost_moment) + shift * with_lost(this->sum, this->lost_sum);
    moment = factor == 0 ? A(0) : factor * moment;
    lost_moment = 0;
    Base::raise_max(max);
  }
};

// The gradient by the input logits x.
template <typename A>
struct GeneralGradient : FullGradient<A> {
  const Transform<A>& transform;

  __device__ __forceinline__ A at(A x, A t) const {
    const A d = transformed(transform, x) - this->max, e = exp_nonpositive(d);
    A value = e * this->factor;
    if (e != 0) value += e * d * this->shifted_factor;
    if (t != 0) value -= t * this->spread;
    return value * slope_at(transform, x);
  }
};

}  // namespace fused_xent::cuda
