// Reads the values of one row from Params, and applies the formulas of xent_math.h to them, for
// host and device.
//
// Acc is the accumulation type, for which the CUDA kernels are compiled. The CPU has its own code
// to finish rows, cpu/row_lanes.h and cpu/row_batch.h, which computes in double.
#pragma once

#include "xent_math.h"
#include "xent_params.h"

namespace fused_xent {

// Calls body with the array of class indices, of its own type.
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
  switch (p.target_kind) {
    case TargetKind::int64:
      return static_cast<const int64_t*>(p.target)[row];
    case TargetKind::int32:
      return static_cast<const int32_t*>(p.target)[row];
    default:
      return static_cast<const uint8_t*>(p.target)[row];
  }
}

// Element i of an array of the accumulation type. On a device that is Acc.
template <typename Acc = double>
XENT_INLINE Acc acc_at([[maybe_unused]] const Params& p, const void* values, int64_t i) {
#if defined(__CUDA_ARCH__)
  return static_cast<const Acc*>(values)[i];
#else
  return p.dtype == DType::float64 ? static_cast<const double*>(values)[i]
                                   : static_cast<const float*>(values)[i];
#endif
}

// Null: the value is not wanted.
template <typename Acc>
XENT_INLINE void set_acc(void* values, int64_t i, Acc value) {
  if (values != nullptr) static_cast<Acc*>(values)[i] = value;
}

template <typename Acc = double>
XENT_INLINE Acc class_weight(const Params& p, int64_t j) {
  return p.weight == nullptr ? Acc(1) : acc_at<Acc>(p, p.weight, j);
}

template <typename Acc = double>
XENT_INLINE Acc token_weight(const Params& p, int64_t row) {
  return p.token_weight == nullptr ? Acc(1) : acc_at<Acc>(p, p.token_weight, row);
}

// ---- labels -----------------------------------------------------------------------------------

// Label smoothing: the label keeps a share, and every class gets a uniform one.
template <typename Acc>
struct Smoothing {
  Acc keep, uniform;
};

XENT_INLINE Smoothing<double> smoothing_of(const Params& p) {
  return {1 - p.label_smoothing, p.label_smoothing / static_cast<double>(p.vocab_size)};
}

// The labels q_j of a row, but without the t_j of all classes.
template <typename Acc>
struct RowLabels {
  Acc target_weight, on_target, spread;  // target_weight: t_target for a class index
};

// What the label on a row's target is multiplied by.
template <typename Acc = double>
XENT_INLINE Acc label_weight(const Params& p, int64_t row, int64_t target) {
  return p.label_weight == nullptr ? class_weight<Acc>(p, target)
                                   : acc_at<Acc>(p, p.label_weight, row);
}

// target: -1 for probabilities.
template <typename Acc>
XENT_INLINE RowLabels<Acc> labels_of(const Params& p, const Smoothing<Acc>& smoothing, int64_t row,
                                     int64_t target) {
  // Two selections, not a branch: that would cost some CUDA kernels registers.
  const Acc of_class = target < 0 ? Acc(0) : class_weight<Acc>(p, target);
  const Acc of_label = target < 0 ? Acc(0) : label_weight<Acc>(p, row, target);
  return {of_class, smoothing.keep * of_label, has_indices(p) ? smoothing.uniform : Acc(1)};
}

// ---- sparse labels ----------------------------------------------------------------------------

// The class at an offset from the first of SparseLabels.
XENT_INLINE int64_t class_of_label(const SparseLabels& sparse, int64_t offset) {
  return sparse.classes_kind == TargetKind::int64
             ? static_cast<const int64_t*>(sparse.classes)[offset]
             : static_cast<const int32_t*>(sparse.classes)[offset];
}

// ---- forward ----------------------------------------------------------------------------------

// What forward computes of a row. mass: of probabilities; slope: of the focal loss.
template <typename Acc>
struct RowResults {
  Acc loss, max, log_sum, mass, slope, entropy;
};

template <typename Acc>
XENT_INLINE void write_results(const Params& p, int64_t row, const RowResults<Acc>& results,
                               int64_t argmax = -1) {
  set_acc(p.row_loss, row, results.loss);
  set_acc(p.row_max, row, results.max);
  set_acc(p.log_sum, row, results.log_sum);
  set_acc(p.label_mass, row, results.mass);
  set_acc(p.loss_slope, row, results.slope);
  set_acc(p.entropy, row, results.entropy);
  if (p.argmax != nullptr) p.argmax[row] = argmax;
}

// The results of a row whose logits are not read.
template <typename Acc>
XENT_INLINE void write_unread_row(const Params& p, int64_t row, Acc value) {
  write_results<Acc>(p, row, {value, value, value, value, value, value});
}

// The results of a row whose loss is the cross-entropy alone: apply_options comes after this.
template <typename Acc>
XENT_INLINE RowResults<Acc> plain_results(const Params& p, int64_t row,
                                          const RowLabels<Acc>& labels, Acc target_logit,
                                          const RowStats<Acc>& stats, Acc log_sum) {
  Acc loss = has_indices(p) ? index_loss(labels.on_target, labels.spread, target_logit - stats.max,
                                         log_sum, stats.mass, stats.dot)
                            : probability_loss(log_sum, stats.mass, stats.dot);
  if (p.extra_loss != nullptr) loss += acc_at<Acc>(p, p.extra_loss, row);
  return {loss, stats.max, log_sum, stats.mass, 1, 0};
}

// Turns the cross-entropy in results into the row's loss. mass is the sum of t_j.
template <typename Acc>
XENT_INLINE void apply_options(const Params& p, int64_t row, const RowLabels<Acc>& labels, Acc mass,
                               RowResults<Acc>& results) {
  if (p.focal_gamma != 0) {
    const Acc q = has_indices(p) ? label_mass(labels.on_target, labels.spread, mass) : mass;
    const auto focal =
        focal_loss<ScalarMath<Acc>>(results.loss, q, static_cast<Acc>(p.focal_gamma));
    results.loss = focal.loss;
    results.slope = focal.slope;
  }
  const Acc lse_square_scale = static_cast<Acc>(p.lse_square_scale);
  results.loss = loss_of_row(results.loss, token_weight<Acc>(p, row), lse_square_scale,
                             results.max + results.log_sum);
}

// ---- backward ---------------------------------------------------------------------------------

// What forward has saved of a row for backward.
template <typename Acc>
XENT_INLINE RowResults<Acc> saved_results(const Params& p, int64_t row) {
  const auto read = [&](const void* values) {
    return values == nullptr ? Acc(0) : acc_at<Acc>(p, values, row);
  };
  return {0,
          read(p.row_max),
          read(p.log_sum),
          read(p.label_mass),
          read(p.loss_slope),
          p.grad_entropy == nullptr ? Acc(0) : acc_at<Acc>(p, p.entropy, row)};
}

// grad_loss is g_loss. The entropy's gradient is not included: see add_entropy_gradient.
template <typename Acc>
XENT_INLINE Upstream<Acc> upstream_of(const Params& p, int64_t row, Acc grad_loss,
                                      const RowResults<Acc>& results) {
  Upstream<Acc> upstream{grad_loss * token_weight<Acc>(p, row), 0, 0};
  if (p.lse_square_scale != 0) {
    const Acc lse = results.max + results.log_sum;
    upstream.softmax = 2 * upstream.g * static_cast<Acc>(p.lse_square_scale) * lse;
  }
  if (p.grad_lse != nullptr) upstream.softmax += acc_at<Acc>(p, p.grad_lse, row);
  if (p.focal_gamma != 0) upstream.g *= results.slope;
  return upstream;
}

template <typename Acc>
XENT_INLINE void add_entropy_gradient(Upstream<Acc>& upstream, const Params& p, int64_t row,
                                      const RowResults<Acc>& results) {
  if (p.grad_entropy == nullptr) return;
  const Acc grad_entropy = acc_at<Acc>(p, p.grad_entropy, row);
  upstream.softmax -= grad_entropy * (results.entropy - results.log_sum);
  upstream.shifted = -grad_entropy;
}

// The gradient of all classes but the target: mass is the sum of t_j.
template <typename Acc>
XENT_INLINE FullGradient<Acc> gradient_of_row(const Upstream<Acc>& upstream,
                                              const RowLabels<Acc>& labels, Acc mass,
                                              const RowResults<Acc>& results) {
  const Acc q = label_mass(labels.on_target, labels.spread, mass);
  const Acc one_over_sum = std::exp(-results.log_sum);
  const Acc factor = (upstream.g * q + upstream.softmax) * one_over_sum;
  return {{results.max, factor, upstream.g * labels.spread}, upstream.shifted * one_over_sum};
}

// The gradient at the target by its transformed logit.
template <typename Acc>
XENT_INLINE Acc gradient_at_target(const Upstream<Acc>& upstream, const RowLabels<Acc>& labels,
                                   Acc mass, const RowResults<Acc>& results, Acc target_logit) {
  const Acc d = target_logit - results.max, log_p = d - results.log_sum, p = std::exp(log_p);
  const Acc gradient = upstream.g * target_gradient(labels.on_target, labels.spread, p,
                                                    std::expm1(log_p), mass, labels.target_weight);
  return add_softmax_part(gradient, upstream.softmax, upstream.shifted, p, d);
}

}  // namespace fused_xent
