// Formulas for scalars, and for vectors with one row in each lane: Real is the type of both. The
// spread and the options are always scalars. The names are those of xent_math.h, which includes
// this file as text. The CPU's kernels include it again for each instruction set: see README.md.

// Adds value to sum, and the rounding error of that addition to lost (Knuth's two-sum).
template <typename Real>
XENT_INLINE void add_to(Real& sum, Real& lost, Real value) {
  const Real total = sum + value, added = total - sum;
  lost += (sum - (total - added)) + (value - added);
  sum = total;
}

// The sum with its rounding errors. Where the sum is not finite, lost is NaN and does not count.
template <typename Real>
XENT_INLINE Real with_lost(Real sum, Real lost) {
  return lost - lost == 0 ? sum + lost : sum;
}

// shifted_target is z_target - m; mass and dot are those of RowStats.
template <typename Real, typename Acc>
XENT_INLINE Real index_loss(Real on_target, Acc spread, Real shifted_target, Real log_sum,
                            Real mass, Real dot) {
  // A target of weight 0 does not hide a row that is not finite: the loss is NaN then.
  const Real loss = on_target == 0 ? log_sum - log_sum : on_target * (log_sum - shifted_target);
  return spread == 0 ? loss : loss + spread * (mass * log_sum - dot);
}

// Q. Without smoothing the class weights of other classes do not count, even infinite ones.
template <typename Real, typename Acc>
XENT_INLINE Real label_mass(Real on_target, Acc spread, Real mass) {
  return spread == 0 ? on_target : on_target + spread * mass;
}

template <typename Real>
XENT_INLINE Real probability_loss(Real log_sum, Real mass, Real dot) {
  return mass * log_sum - dot;
}

// A loss, and its derivative by the cross-entropy.
template <typename Real>
struct FocalLoss {
  Real loss, slope;
};

// Math has the functions of Real, a scalar or a vector of scalars; gamma is a scalar. mass is Q,
// gamma > 0. NaN for a negative cross-entropy, which labels below 0 may give.
template <typename Math, typename Real, typename Acc>
XENT_INLINE FocalLoss<Real> focal_loss(Real cross_entropy, Real mass, Acc gamma) {
  const Real minus_log_p = cross_entropy / mass, p = Math::exp(-minus_log_p);
  // rest + lost is 1 - p with all of its digits, whether p is near 1 or near 0. They matter: a
  // large gamma multiplies the error of the logarithm.
  const Real rounded = 1 - p, exact = -Math::expm1(-minus_log_p);
  const Real rest = p < Acc(0.5) ? rounded : exact;
  const Real lost = p < Acc(0.5) ? (1 - rounded) - p : Real{};
  const Real factor = Math::exp(gamma * (Math::log(rest) + lost / rest));
  const Real rise = p == 0 ? Real{} : gamma * p * minus_log_p / rest;
  const auto is_0 = (cross_entropy == 0) | (factor == 0);
  return {is_0 ? Real{} : factor * cross_entropy, is_0 ? Real{} : factor * (1 + rise)};
}

// A row's loss from its focal loss.
template <typename Real, typename Acc>
XENT_INLINE Real loss_of_row(Real focal_loss, Real token_weight, Acc lse_square_scale, Real lse) {
  if (lse_square_scale != 0) focal_loss += lse_square_scale * lse * lse;
  return token_weight * focal_loss;
}

// Q p - q at the target, from both p and expm1(log p) = p - 1: each is exact where the other, plus
// or minus 1, would cancel. mass is the sum of t_j, t is t_target.
template <typename Real, typename Acc>
XENT_INLINE Real target_gradient(Real on_target, Acc spread, Real p, Real expm1_log_p, Real mass,
                                 Real t) {
  const Real gradient = on_target * expm1_log_p;
  return spread == 0 ? gradient : gradient + spread * (mass * p - t);
}

// Adds the part of softmax and shifted to a gradient at the target. d is z_target - m.
template <typename Real>
XENT_INLINE Real add_softmax_part(Real gradient, Real softmax, Real shifted, Real p, Real d) {
  const Real part = p * (softmax + shifted * d);
  return p == 0 ? gradient : gradient + part;
}
