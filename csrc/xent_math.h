// The formulas of softmax cross-entropy for one row, for host and device. No torch.
//
// A row of logits x has maximum m, sum s = sum_j exp(x_j - m), log-sum-exp lse = m + log(s) and
// probabilities p_j = exp(x_j - m) / s. Every kind of label is one weight vector over the classes,
//
//     q_j = on_target * [j == target] + spread * t_j
//
//   class index    on_target = (1 - smoothing) * w_target, spread = smoothing / V, t_j = w_j
//   probabilities  on_target = 0, spread = 1, t_j = w_j * ((1 - smoothing) * target_j + smoothing /
//   V)
//
// where w are the class weights, 1 without them. Then, with Q = sum_j q_j,
//
//     loss   = sum_j q_j * (lse - x_j)
//     grad_j = Q * p_j - q_j
//
// Everything is written in x_j - m and log(s), never in lse: at an offset of 1e4, lse - x_j has
// lost its digits. A class of weight or probability 0 adds nothing, even where its logit is -inf: 0
// * (-inf) is 0 here. The smoothed loss is that of Szegedy et al.,
// https://arxiv.org/abs/1512.00567.
#pragma once

#include <cmath>

#include "xent_inline.h"

namespace fused_xent {

// What one sweep over some classes of a row leaves behind.
template <typename Acc>
struct RowStats {
  Acc max;   // m: of these classes; the lowest finite number where all are -inf
  Acc sum;   // of exp(x_j - m)
  Acc mass;  // of t_j; 0 where no t is given
  Acc dot;   // of t_j * (x_j - m)
};

// Moves stats to another maximum, however far: what is 0 stays 0.
template <typename Acc>
XENT_INLINE void shift_stats(RowStats<Acc>& stats, Acc max) {
  const Acc shift = stats.max - max;
  if (stats.sum != 0) stats.sum *= std::exp(shift);
  if (stats.mass != 0) stats.dot += shift * stats.mass;
  stats.max = max;
}

// Adds the stats of later classes of the same row.
template <typename Acc>
XENT_INLINE void merge_stats(RowStats<Acc>& stats, RowStats<Acc> other) {
  const Acc max = other.max > stats.max ? other.max : stats.max;
  shift_stats(stats, max);
  shift_stats(other, max);
  stats.sum += other.sum;
  stats.mass += other.mass;
  stats.dot += other.dot;
}

// Below, Real is a scalar or a vector of lanes, one row a lane; spread is a scalar of the same
// type. shifted_target is x_target - m; mass and dot are those of RowStats.
template <typename Real, typename Acc>
XENT_INLINE Real index_loss(Real on_target, Acc spread, Real shifted_target, Real log_sum,
                            Real mass, Real dot) {
  // The row itself counts: where log_sum is not finite, neither is the loss.
  const Real loss = on_target == 0 ? log_sum - log_sum : on_target * (log_sum - shifted_target);
  return spread == 0 ? loss : loss + spread * (mass * log_sum - dot);
}

// Q, of which class weights of no row's target, even infinite ones, are no part without smoothing.
template <typename Real, typename Acc>
XENT_INLINE Real label_mass(Real on_target, Acc spread, Real mass) {
  return spread == 0 ? on_target : on_target + spread * mass;
}

template <typename Real>
XENT_INLINE Real probability_loss(Real log_sum, Real mass, Real dot) {
  return mass * log_sum - dot;
}

// Q p - q at the target. As p nears 1 it cancels, and as p nears 0 p is more than 1 + expm1(log p)
// keeps: hence both. mass is the sum of t_j, t is t_target.
template <typename Real, typename Acc>
XENT_INLINE Real target_gradient(Real on_target, Acc spread, Real p, Real expm1_log_p, Real mass,
                                 Real t) {
  const Real gradient = on_target * expm1_log_p;
  return spread == 0 ? gradient : gradient + spread * (mass * p - t);
}

// The mean by the sum of the targets' weights. Of a sum of 0 it is NaN: torch divides the target's
// part and smoothing's part of the loss apart, and the former is 0 then.
XENT_INLINE double mean_of(double sum, double total_weight) {
  return total_weight == 0 ? NAN : sum / total_weight;
}

}  // namespace fused_xent
