// The operators' arguments, on any device: tensors to pointers, what they return, what they check.
//
// Call is one call on a device, cpu.cpp's or cuda.cpp's. It is made of Problem's arguments, and has
//   problem, params
//   forward(rows, total, loss_dtype)    the loss and total_weight, rows filled
//   forward_backward(rows, total, loss_dtype)    the loss; rows and params.grad_logits filled
//   backward(total_weight)              params.grad_logits filled; total_weight may be null: 1
//   scale_gradient()
//   prepare(gradient)                   fresh memory, which is about to be written
#pragma once

#include <tuple>

#include "tensors.h"

namespace fused_xent::binding {

// How the rows' losses become one.
struct Total {
  int64_t reduction;
  const Tensor* normalizer;  // divides the sum under mean; null: the rows' weights do
};

template <typename Call>
struct Operators {
  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(
      const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
      const OptionalTensor& token_weight, const OptionalTensor& normalizer, int64_t dim,
      int64_t ignore_index, const Numbers& numbers, int64_t reduction, ScalarType loss_dtype,
      bool statistics) {
    check_reduction(reduction, loss_dtype);
    Call call(logits, target, weight, token_weight, dim, ignore_index, numbers);
    const Total total = total_of(call.problem, reduction, normalizer);
    const Rows rows(call.problem, call.params, statistics);
    const auto [loss, total_weight] = call.forward(rows, total, loss_dtype);
    return {loss,         total_weight, rows.max, rows.log_sum, rows.label_mass, rows.loss_slope,
            rows.entropy, rows.argmax};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward_backward_(
      const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
      const OptionalTensor& token_weight, const OptionalTensor& normalizer, int64_t dim,
      int64_t ignore_index, const Numbers& numbers, int64_t reduction, ScalarType loss_dtype,
      bool statistics) {
    check_reduction(reduction, loss_dtype);
    Call call(logits, target, weight, token_weight, dim, ignore_index, numbers);
    const Total total = total_of(call.problem, reduction, normalizer);
    set_grad_logits(call.params, "logits", logits, dim);
    const Rows rows(call.problem, call.params, statistics);
    const Tensor loss = call.forward_backward(rows, total, loss_dtype);
    return {loss, rows.max, rows.log_sum, rows.entropy, rows.argmax};
  }

  static Tensor backward(const OptionalTensor& grad_loss, const OptionalTensor& grad_lse,
                         const OptionalTensor& grad_entropy, const Tensor& logits,
                         const Tensor& target, const OptionalTensor& weight,
                         const OptionalTensor& token_weight, const Tensor& total_weight,
                         const Tensor& row_max, const Tensor& log_sum, const Tensor& label_mass,
                         const Tensor& loss_slope, const Tensor& entropy, int64_t dim,
                         int64_t ignore_index, const Numbers& numbers, int64_t reduction) {
    Call call(logits, target, weight, token_weight, dim, ignore_index, numbers);
    const Tensor grad_logits = empty_gradient(logits, dim);
    call.prepare(grad_logits);
    backward_into(grad_logits, call, {grad_loss, grad_lse, grad_entropy},
                  {total_weight, row_max, log_sum, label_mass, loss_slope, entropy}, dim,
                  reduction);
    return grad_logits;
  }

  static void backward_(const OptionalTensor& grad_loss, const OptionalTensor& grad_lse,
                        const OptionalTensor& grad_entropy, const Tensor& logits,
                        const Tensor& target, const OptionalTensor& weight,
                        const OptionalTensor& token_weight, const Tensor& total_weight,
                        const Tensor& row_max, const Tensor& log_sum, const Tensor& label_mass,
                        const Tensor& loss_slope, const Tensor& entropy, int64_t dim,
                        int64_t ignore_index, const Numbers& numbers, int64_t reduction) {
    Call call(logits, target, weight, token_weight, dim, ignore_index, numbers);
    backward_into(logits, call, {grad_loss, grad_lse, grad_entropy},
                  {total_weight, row_max, log_sum, label_mass, loss_slope, entropy}, dim,
                  reduction);
  }

  static void scale_gradient_(const Tensor& grad_logits, const Tensor& grad_loss,
                              const Tensor& target, const OptionalTensor& token_weight, int64_t dim,
                              int64_t ignore_index) {
    Call call(grad_logits, target, std::nullopt, token_weight, dim, ignore_index,
              Numbers{0, 0, 0, 0, 1});
    const Tensor upstream = call.problem.set_grad_loss(call.params, grad_loss);
    set_grad_logits(call.params, "grad_logits", grad_logits, dim);
    if (call.params.vocab_size > 0) call.scale_gradient();
  }

  template <typename Library>
  static void implement(Library& m) {
    m.impl("forward", TORCH_BOX(&forward));
    m.impl("backward", TORCH_BOX(&backward));
    m.impl("backward_", TORCH_BOX(&backward_));
    m.impl("forward_backward_", TORCH_BOX(&forward_backward_));
    m.impl("scale_gradient_", TORCH_BOX(&scale_gradient_));
  }

 private:
  struct Upstream {
    const OptionalTensor &loss, &lse, &entropy;
  };
  struct Saved {
    const Tensor &total_weight, &row_max, &log_sum, &label_mass, &loss_slope, &entropy;
  };

  // On the logits' device.
  static Tensor zero(const Call& call) {
    Tensor zero = torch::stable::new_empty(call.problem.logits, {}, call.problem.acc_dtype);
    return torch::stable::zero_(zero);
  }

  static Total total_of(const Problem& problem, int64_t reduction,
                        const OptionalTensor& normalizer) {
    return {reduction, normalizer ? &problem.check_scalar("normalizer", *normalizer) : nullptr};
  }

  static void backward_into(const Tensor& grad_logits, Call& call, const Upstream& upstream,
                            const Saved& saved, int64_t dim, int64_t reduction) {
    const Problem& problem = call.problem;
    Params& p = call.params;
    check_reduction(reduction, problem.acc_dtype);
    problem.check_scalar("total_weight", saved.total_weight);
    p.row_max = problem.check_rows("row_max", saved.row_max).data_ptr();
    p.log_sum = problem.check_rows("log_sum", saved.log_sum).data_ptr();
    if (p.target_kind == TargetKind::probabilities) {
      p.label_mass = problem.check_rows("label_mass", saved.label_mass).data_ptr();
    }
    if (p.focal_gamma != 0) {
      p.loss_slope = problem.check_rows("loss_slope", saved.loss_slope).data_ptr();
    }
    const Tensor grad_loss = problem.set_grad_loss(p, upstream.loss ? *upstream.loss : zero(call));
    if (upstream.lse) p.grad_lse = problem.check_rows("grad_lse", *upstream.lse).data_ptr();
    if (upstream.entropy) {
      p.grad_entropy = problem.check_rows("grad_entropy", *upstream.entropy).data_ptr();
      p.entropy = problem.check_rows("entropy", saved.entropy).data_ptr();
    }
    set_grad_logits(p, "grad_logits", grad_logits, dim);
    if (p.vocab_size > 0) call.backward(reduction == kMean ? &saved.total_weight : nullptr);
  }
};

}  // namespace fused_xent::binding
