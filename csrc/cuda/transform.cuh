// From input logits x to transformed logits z: scaled, and capped (Gemma 2,
// https://arxiv.org/abs/2408.00118).
#pragma once

#include "../xent_params.h"
#include "memory.cuh"

namespace fused_xent::cuda {

// z, and its slope, the derivative by x.
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
  // scale / cosh^2: 1 - tanh^2 would cancel.
  __device__ __forceinline__ A slope(A x) const {
    if (softcap == 0) return scale;
    const A e = exp_nonpositive(-2 * fabs(x * inner)), one_plus_e = 1 + e;
    return 4 * scale * e / (one_plus_e * one_plus_e);
  }
};

}  // namespace fused_xent::cuda
