// The formulas of softmax cross-entropy for one row, for host and device. No torch.
//
// Logits z_j = softcap * tanh(logit_scale * x_j / softcap), or logit_scale * x_j without a softcap,
// are x_j itself as a rule, and called x below.
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
//     cross_entropy = sum_j q_j * (lse - x_j)
//     grad_j        = Q * p_j - q_j
//
// A row's loss is token_weight * (focal(cross_entropy) + lse_square_scale * lse^2). The focal loss
// (Lin et al., https://arxiv.org/abs/1708.02002) of labels on any number of classes takes for the
// label's probability P their geometric mean, weighted by q: that is p_target for a class index.
//
//     focal(c) = (1 - P)^gamma * c,  P = exp(-c / Q)
//
// Upstream gradients of a row's loss, lse and entropy, g_loss, g_lse and g_entropy, make, with g =
// g_loss * token_weight * focal'(cross_entropy), the gradient
//
//     g * (Q p_j - q_j) + p_j * (softmax + shifted * (x_j - m))
//     softmax = 2 g_loss token_weight lse_square_scale lse + g_lse - g_entropy (entropy - log(s))
//     shifted = -g_entropy
//
// Everything is written in x_j - m and log(s), never in lse: at an offset of 1e4, lse - x_j has
// lost its digits. A class of weight or probability 0 adds nothing, even where its logit is -inf: 0
// * (-inf) is 0 here. The smoothed loss is that of Szegedy et al.,
// https://arxiv.org/abs/1512.00567.
#pragma once

#include <cmath>
#include <cstdint>

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

// What the statistics need besides. The entropy is log(sum) - moment / sum.
template <typename Acc>
struct FullStats : RowStats<Acc> {
  Acc moment;      // of exp(x_j - m) * (x_j - m), 0 where x_j is -inf
  Acc top;         // the greatest x_j, NaN above all
  int64_t argmax;  // the first class that has it; -1 of no classes
};

template <typename Acc>
XENT_INLINE void shift_stats(FullStats<Acc>& stats, Acc max) {
  const Acc shift = stats.max - max, factor = std::exp(shift);
  stats.moment = factor == 0 ? Acc(0) : factor * (stats.moment + shift * stats.sum);
  shift_stats<Acc>(static_cast<RowStats<Acc>&>(stats), max);
}

// Whether x at class j is rather the argmax than what there is.
template <typename Acc>
XENT_INLINE bool is_above(const FullStats<Acc>& stats, Acc x, int64_t j) {
  if (stats.argmax < 0) return true;
  const bool both_nan = x != x && stats.top != stats.top;
  if (both_nan || x == stats.top) return j < stats.argmax;
  return x != x || x > stats.top;
}

template <typename Acc>
XENT_INLINE void merge_stats(FullStats<Acc>& stats, FullStats<Acc> other) {
  const Acc max = other.max > stats.max ? other.max : stats.max;
  shift_stats(stats, max);
  shift_stats(other, max);
  stats.sum += other.sum;
  stats.mass += other.mass;
  stats.dot += other.dot;
  stats.moment += other.moment;
  if (other.argmax >= 0 && is_above(stats, other.top, other.argmax)) {
    stats.top = other.top;
    stats.argmax = other.argmax;
  }
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

// A loss, and its derivative by the cross-entropy.
template <typename Real>
struct FocalLoss {
  Real loss, slope;
};

// mass is Q, gamma > 0. Of a cross-entropy that is negative, as labels below 0 may make it, NaN.
template <typename Real>
XENT_INLINE FocalLoss<Real> focal_loss(Real cross_entropy, Real mass, Real gamma) {
  if (cross_entropy == 0) return {0, 0};
  const Real minus_log_p = cross_entropy / mass, p = std::exp(-minus_log_p);
  const Real one_minus_p = -std::expm1(-minus_log_p);
  const Real factor = std::exp(gamma * std::log(one_minus_p));
  const Real rise = p == 0 ? 0 : gamma * p * minus_log_p / one_minus_p;
  return {factor * cross_entropy, factor * (1 + rise)};
}

// What a row's gradient is made of besides its labels and probabilities: see above.
template <typename Real>
struct Upstream {
  Real g, softmax, shifted;
};

// The mean by the sum of the targets' weights. Of a sum of 0 it is NaN: torch divides the target's
// part and smoothing's part of the loss apart, and the former is 0 then.
XENT_INLINE double mean_of(double sum, double total_weight) {
  return total_weight == 0 ? NAN : sum / total_weight;
}

}  // namespace fused_xent
