// From input logits x to transformed logits z: scaled, and capped (Gemma 2,
// https://arxiv.org/abs/2408.00118). Included like simd.h.

template <typename A>
struct Transform {
  A scale, softcap, inner;  // inner: of the hyperbolic tangent's argument; 0 without a softcap

  explicit Transform(const Params& p)
      : scale(static_cast<A>(p.logit_scale)),
        softcap(static_cast<A>(p.softcap)),
        inner(p.softcap == 0 ? A(0) : static_cast<A>(p.logit_scale / p.softcap)) {}

  struct Lanes {
    Vec<A> logit, slope;
  };

  // The slope is scale / cosh^2: 1 - tanh^2 would cancel.
  XENT_INLINE Lanes operator()(Vec<A> x) const {
    if (softcap == 0) return {x * scale, Vec<A>{} + scale};
    const Vec<A> y = x * inner, minus_2y = y > 0 ? -2 * y : 2 * y;
    const Vec<A> e = exp_nonpositive(minus_2y), one_plus_e = e + 1;
    const Vec<A> tanh = -expm1_nonpositive(minus_2y) / one_plus_e;
    const Vec<A> capped = softcap * tanh;
    return {y < 0 ? -capped : capped, 4 * scale * e / (one_plus_e * one_plus_e)};
  }
};
