// The formulas of softmax cross-entropy for one row, for host and device. No torch.
//
// x_j are the input logits of a row, z_j the logits that the softmax sees:
//
//     z_j = softcap * tanh(logit_scale * x_j / softcap),  or logit_scale * x_j without a softcap
//
// Without a softcap and with a scale of 1, z_j is x_j. A row has the maximum m = max_j z_j, the sum
// s = sum_j exp(z_j - m), the log-sum-exp lse = m + log(s) and the probabilities
// p_j = exp(z_j - m) / s. Every kind of label is one vector of weights over the classes,
//
//     q_j = on_target * [j == target] + spread * t_j
//
//   class index    on_target = (1 - smoothing) * w_target, spread = smoothing / V, t_j = w_j
//   probabilities  on_target = 0, spread = 1,
//                  t_j = w_j * ((1 - smoothing) * target_j + smoothing / V)
//
// where w are the class weights, 1 if there are none. Then, with Q = sum_j q_j,
//
//     cross_entropy = sum_j q_j * (lse - z_j)
//     d cross_entropy / d z_j = Q * p_j - q_j
//
// A row's loss is token_weight * (focal(cross_entropy) + lse_square_scale * lse^2). The focal loss
// (Lin et al., https://arxiv.org/abs/1708.02002) of a row is
//
//     focal(c) = (1 - P)^gamma * c,  P = exp(-c / Q)
//
// where P is p_target for a class index, and for other labels the geometric mean of the p_j,
// weighted by q_j.
//
// Let g_loss, g_lse and g_entropy be the upstream gradients of a row's loss, lse and entropy, and
// g = g_loss * token_weight * focal'(cross_entropy). The gradient by z_j is
//
//     g * (Q p_j - q_j) + p_j * (softmax + shifted * (z_j - m))
//     softmax = 2 g_loss token_weight lse_square_scale lse + g_lse - g_entropy (entropy - log(s))
//     shifted = -g_entropy
//
// and the gradient by x_j is that times d z_j / d x_j, the slope.
//
// Everything is computed from z_j - m and log(s), never from lse: where all logits are near 1e4,
// lse - z_j has few correct digits. A class of weight or probability 0 adds 0, even if its logit is
// -inf: 0 * (-inf) is 0 here. Label smoothing is that of Szegedy et al.,
// https://arxiv.org/abs/1512.00567.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "xent_inline.h"

namespace fused_xent {

XENT_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#include "xent_formulas.h"

// ---- sums -------------------------------------------------------------------------------------

// The statistics of some or all classes of a row.
template <typename Acc>
struct RowStats {
  Acc max;   // m of these classes; the lowest finite number where all are -inf
  Acc sum;   // of exp(z_j - m)
  Acc mass;  // of t_j; 0 where no t is given
  Acc dot;   // of t_j * (z_j - m)
};

// Expresses stats by another maximum. A sum that is 0 stays 0, however far the maximum moves.
template <typename Acc>
XENT_INLINE void shift_stats(RowStats<Acc>& stats, Acc max) {
  const Acc shift = stats.max - max;
  if (stats.sum != 0) stats.sum *= std::exp(shift);
  if (stats.mass != 0) stats.dot += shift * stats.mass;
  stats.max = max;
}

// Adds the sums of other classes of the same row, which have the same maximum.
template <typename Acc>
XENT_INLINE void add_sums(RowStats<Acc>& stats, const RowStats<Acc>& other) {
  stats.sum += other.sum;
  stats.mass += other.mass;
  stats.dot += other.dot;
}

// Adds the stats of later classes of the same row.
template <typename Acc>
XENT_INLINE void merge_stats(RowStats<Acc>& stats, RowStats<Acc> other) {
  const Acc max = other.max > stats.max ? other.max : stats.max;
  shift_stats(stats, max);
  shift_stats(other, max);
  add_sums(stats, other);
}

// RowStats, and what entropy and argmax need.
template <typename Acc>
struct FullStats : RowStats<Acc> {
  Acc moment;      // of exp(z_j - m) * (z_j - m), 0 where z_j is -inf
  Acc top;         // the greatest z_j; NaN is above all numbers
  int64_t argmax;  // the first class whose z_j is top; -1 where there are no classes
};

template <typename Acc>
XENT_INLINE void shift_stats(FullStats<Acc>& stats, Acc max) {
  const Acc shift = stats.max - max, factor = std::exp(shift);
  stats.moment = factor == 0 ? Acc(0) : factor * (stats.moment + shift * stats.sum);
  shift_stats<Acc>(static_cast<RowStats<Acc>&>(stats), max);
}

// True if class j, of logit z, is the argmax of stats and class j.
template <typename Acc>
XENT_INLINE bool is_above(const FullStats<Acc>& stats, Acc z, int64_t j) {
  if (stats.argmax < 0) return true;
  const bool both_nan = z != z && stats.top != stats.top;
  if (both_nan || z == stats.top) return j < stats.argmax;
  return z != z || z > stats.top;
}

template <typename Acc>
XENT_INLINE void merge_stats(FullStats<Acc>& stats, FullStats<Acc> other) {
  const Acc max = other.max > stats.max ? other.max : stats.max;
  shift_stats(stats, max);
  shift_stats(other, max);
  add_sums<Acc>(stats, other);
  stats.moment += other.moment;
  if (other.argmax >= 0 && is_above(stats, other.top, other.argmax)) {
    stats.top = other.top;
    stats.argmax = other.argmax;
  }
}

// The sum is at least 1, the maximum's own term, but rounding may leave it a little below.
template <typename Acc>
XENT_INLINE Acc log_sum_of(const RowStats<Acc>& stats) {
  return 0 < stats.sum && stats.sum < 1 ? Acc(0) : std::log(stats.sum);
}

// The rounding error of shift, which is a - b rounded: (a - b) - shift, exactly (Knuth's two-sum).
template <typename Acc>
XENT_INLINE Acc error_of_difference(Acc a, Acc b, Acc shift) {
  const Acc rounded_b = a - shift, rounded_a = shift + rounded_b;
  return (a - rounded_a) + (rounded_b - b);
}

// Adds class j, of logit z, to the stats of all other classes, and returns log(s). If z is far
// above the others, their sum is the loss: it would lose its digits if it were added to 1.
template <typename Stats, typename Acc>
XENT_INLINE Acc add_class(Stats& stats, Acc z, int64_t j) {
  constexpr bool kIsFull = std::is_same_v<Stats, FullStats<Acc>>;
  if constexpr (kIsFull) {
    if (is_above(stats, z, j)) {
      stats.top = z;
      stats.argmax = j;
    }
  }
  Acc moment = 0, log_sum;
  if (z >= stats.max) {
    // exp(shift) alone would be 4e-6 off where the others are 80 below z.
    const Acc error = error_of_difference(stats.max, z, stats.max - z);
    shift_stats(stats, z);
    if (stats.sum != 0) stats.sum += stats.sum * error;
    const Acc zero = z - z;  // NaN for an infinite z
    log_sum = std::log1p(stats.sum) + zero;
    stats.sum += 1 + zero;
  } else {
    const Acc d = z - stats.max, e = std::exp(d);
    stats.sum += e;
    if (e != 0) moment = e * d;
    log_sum = log_sum_of(stats);
  }
  if constexpr (kIsFull) stats.moment += moment;
  return log_sum;
}

template <typename Acc>
XENT_INLINE Acc entropy_of(const FullStats<Acc>& stats, Acc log_sum) {
  return log_sum - stats.moment / stats.sum;
}

// ---- losses -----------------------------------------------------------------------------------

// The functions that focal_loss calls.
template <typename Real>
struct ScalarMath {
  XENT_INLINE static Real exp(Real x) { return std::exp(x); }
  XENT_INLINE static Real expm1(Real x) { return std::expm1(x); }
  XENT_INLINE static Real log(Real x) { return std::log(x); }
};

// The mean of losses by the sum of the targets' weights. It is NaN where that sum is 0, as in
// torch, which divides the target's part of the loss (0 then) and smoothing's part separately.
XENT_INLINE double mean_of(double sum, double total_weight) {
  return total_weight == 0 ? NAN : sum / total_weight;
}

// ---- gradients --------------------------------------------------------------------------------

// The upstream gradients of a row: see the top of this file.
template <typename Real>
struct Upstream {
  Real g, softmax, shifted;
};

// The gradient by z_j of all classes but the target is factor * exp(z_j - max) - spread * t_j.
template <typename Real>
struct RowGradient {
  Real max, factor, spread;
};

// The same where the entropy has an upstream gradient: shifted_factor * (z_j - max) is added to
// factor.
template <typename Real>
struct FullGradient : RowGradient<Real> {
  Real shifted_factor;
};

}  // namespace fused_xent
