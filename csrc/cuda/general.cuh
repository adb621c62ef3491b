// What one thread makes of classes where these cost more than the softmax: transformed logits, the
// statistics, the gradient of the entropy.
#pragma once

#include "labels.cuh"
#include "sweep.cuh"

namespace fused_xent::cuda {

// Logits as the softmax sees them, and their derivative by the logits as they are.
template <typename A>
struct Transform {
  A scale, softcap, inner;  // inner: of the hyperbolic tangent's argument

  __device__ explicit Transform(const Params& p)
      : scale(static_cast<A>(p.logit_scale)), softcap(static_cast<A>(p.softcap)), inner(0) {
    if (softcap != 0) inner = scale / softcap;
  }
  __device__ __forceinline__ A logit(A x) const {
    return softcap == 0 ? x * scale : softcap * tanh(x * inner);
  }
  // scale / cosh^2, without the cancellation of 1 - tanh^2.
  __device__ __forceinline__ A slope(A x) const {
    if (softcap == 0) return scale;
    const A e = exp_nonpositive(-2 * fabs(x * inner)), one_plus_e = 1 + e;
    return 4 * scale * e / (one_plus_e * one_plus_e);
  }
};

// FullStats, whose sums keep what they lose.
template <typename A>
struct GeneralStats : SweepStats<A, true> {
  A lost_sum = 0, moment = 0, lost_moment = 0, top = -kInfinity<A>;
  int argmax = -1;

  // N classes at once: labels t, logits z, of which those that are not there are minus infinity and
  // come last.
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
    add_to(this->sum, lost_sum, sums[0]);
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
    RowStats<A> stats = SweepStats<A, true>::result();
    stats.sum = with_lost(stats.sum, lost_sum);
    return {stats, with_lost(moment, lost_moment), top, argmax};
  }

 private:
  __device__ __forceinline__ void raise_max(A max) {
    if (max == this->max) return;
    const A shift = this->max - max, factor = exp_nonpositive(shift);
    moment = with_lost(moment, lost_moment) + shift * with_lost(this->sum, lost_sum);
    moment = factor == 0 ? A(0) : factor * moment;
    lost_moment = 0;
    lost_sum *= factor;
    SweepStats<A, true>::raise_max(max);
  }
};

// The gradient at class j is, by the logit as it is,
//     ((factor + shifted * (z_j - max)) * exp(z_j - max) - spread * t_j) * slope(x_j)
template <typename A>
struct GeneralGradient {
  A max, factor, shifted, spread;
  Transform<A> transform;

  __device__ __forceinline__ A at(A x, A t) const {
    const A d = transform.logit(x) - max, e = exp_nonpositive(d);
    A value = e * factor;
    if (e != 0) value += e * d * shifted;
    if (t != 0) value -= t * spread;
    return value * transform.slope(x);
  }
};

// Upstream, with that of the entropy.
template <typename A>
__device__ __forceinline__ Upstream<A> general_upstream(const Arguments& a, A scale, int64_t row,
                                                        const RowResults<A>& r, A entropy) {
  Upstream<A> upstream = upstream_of_row(a, scale, row, r);
  if (a.grad_entropy != nullptr) {
    const A grad_entropy = static_cast<const A*>(a.grad_entropy)[row];
    upstream.softmax -= grad_entropy * (entropy - r.log_sum);
    upstream.shifted = -grad_entropy;
  }
  return upstream;
}

}  // namespace fused_xent::cuda
