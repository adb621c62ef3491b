// The numbers of rows and classes that Params point to.
#pragma once

#include "../xent_math.h"
#include "../xent_params.h"

namespace fused_xent::cpu {

// Calls body with the class indices, of their own type.
template <typename Body>
XENT_INLINE auto with_indices(const Params& p, const Body& body) {
  switch (p.target_kind) {
    case TargetKind::int64:
      return body(static_cast<const int64_t*>(p.target));
    case TargetKind::int32:
      return body(static_cast<const int32_t*>(p.target));
    default:
      return body(static_cast<const uint8_t*>(p.target));
  }
}

XENT_INLINE int64_t target_index(const Params& p, int64_t row) {
  return with_indices(p, [&](const auto* target) { return static_cast<int64_t>(target[row]); });
}

XENT_INLINE bool has_indices(const Params& p) { return p.target_kind != TargetKind::probabilities; }

XENT_INLINE double acc_at(const Params& p, const void* values, int64_t i) {
  return p.dtype == DType::float64 ? static_cast<const double*>(values)[i]
                                   : static_cast<const float*>(values)[i];
}

XENT_INLINE void set_acc(const Params& p, void* values, int64_t i, double value) {
  if (p.dtype == DType::float64) {
    static_cast<double*>(values)[i] = value;
  } else {
    static_cast<float*>(values)[i] = static_cast<float>(value);
  }
}

XENT_INLINE double class_weight(const Params& p, int64_t index) {
  return p.weight == nullptr ? 1.0 : acc_at(p, p.weight, index);
}

XENT_INLINE double token_weight(const Params& p, int64_t row) {
  return p.token_weight == nullptr ? 1.0 : acc_at(p, p.token_weight, row);
}

// Of such a row nothing is read, its target is not judged, and its loss and gradient are 0.
XENT_INLINE bool is_left_out(const Params& p, int64_t row) {
  return (has_indices(p) && target_index(p, row) == p.ignore_index) || token_weight(p, row) == 0;
}

// Whether a row's loss is more than its cross-entropy, or its gradient more than that of its loss.
XENT_INLINE bool has_row_options(const Params& p) {
  return p.token_weight != nullptr || p.lse_square_scale != 0 || p.focal_gamma != 0 ||
         p.grad_lse != nullptr || p.grad_entropy != nullptr;
}

XENT_INLINE Upstream<double> upstream_of(const Params& p, int64_t row) {
  const double grad_loss = acc_at(p, p.grad_loss, row * p.grad_loss_stride) * p.grad_scale;
  if (!has_row_options(p)) return {grad_loss, 0, 0};
  Upstream<double> upstream{grad_loss * token_weight(p, row), 0, 0};
  const double log_sum = acc_at(p, p.log_sum, row);
  if (p.lse_square_scale != 0) {
    const double lse = acc_at(p, p.row_max, row) + log_sum;
    upstream.softmax += 2 * upstream.g * p.lse_square_scale * lse;
  }
  if (p.grad_lse != nullptr) upstream.softmax += acc_at(p, p.grad_lse, row);
  if (p.grad_entropy != nullptr) {
    const double grad_entropy = acc_at(p, p.grad_entropy, row);
    upstream.softmax -= grad_entropy * (acc_at(p, p.entropy, row) - log_sum);
    upstream.shifted = -grad_entropy;
  }
  if (p.loss_slope != nullptr) upstream.g *= acc_at(p, p.loss_slope, row);
  return upstream;
}

}  // namespace fused_xent::cpu
