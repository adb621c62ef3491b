// The focal loss: see xent_math.h, which includes this file as text. The CPU's vector kernels
// include it once more for each instruction set, with functions of vectors: see README.md.

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
  // rest + lost is 1 - p, with all digits where p is near 1, and where p is near 0, because a large
  // gamma multiplies those that 1 - p loses.
  const Real rounded = 1 - p, exact = -Math::expm1(-minus_log_p);
  const Real rest = p < Acc(0.5) ? rounded : exact;
  const Real lost = p < Acc(0.5) ? (1 - rounded) - p : Real{};
  const Real factor = Math::exp(gamma * (Math::log(rest) + lost / rest));
  const Real rise = p == 0 ? Real{} : gamma * p * minus_log_p / rest;
  const auto is_0 = (cross_entropy == 0) | (factor == 0);
  return {is_0 ? Real{} : factor * cross_entropy, is_0 ? Real{} : factor * (1 + rise)};
}
