// The operators, for every device. Python (fused_xent/_ops.py) gives their meaning and their meta
// implementations; operators.h takes their arguments, cpu.cpp and cuda.cpp implement them.
#pragma once

#include <torch/csrc/stable/library.h>

namespace fused_xent::binding {

// "numbers" are label_smoothing, lse_square_scale, focal_gamma, softcap (0: none) and logit_scale.
template <typename Library>
void define_operators(Library& m) {
  m.def(
      "forward(Tensor logits, Tensor target, Tensor? weight, Tensor? token_weight, "
      "Tensor? normalizer, int dim, int ignore_index, float[] numbers, int reduction, "
      "ScalarType loss_dtype, bool statistics) "
      "-> (Tensor loss, Tensor total_weight, Tensor row_max, Tensor log_sum, Tensor label_mass, "
      "Tensor loss_slope, Tensor entropy, Tensor argmax)");
  m.def(
      "backward(Tensor? grad_loss, Tensor? grad_lse, Tensor? grad_entropy, Tensor logits, "
      "Tensor target, Tensor? weight, Tensor? token_weight, Tensor total_weight, Tensor row_max, "
      "Tensor log_sum, Tensor label_mass, Tensor loss_slope, Tensor entropy, int dim, "
      "int ignore_index, float[] numbers, int reduction) -> Tensor grad_logits");
  m.def(
      "backward_(Tensor? grad_loss, Tensor? grad_lse, Tensor? grad_entropy, Tensor(a!) logits, "
      "Tensor target, Tensor? weight, Tensor? token_weight, Tensor total_weight, Tensor row_max, "
      "Tensor log_sum, Tensor label_mass, Tensor loss_slope, Tensor entropy, int dim, "
      "int ignore_index, float[] numbers, int reduction) -> ()");
  m.def(
      "forward_backward_(Tensor(a!) logits, Tensor target, Tensor? weight, Tensor? token_weight, "
      "Tensor? normalizer, int dim, int ignore_index, float[] numbers, int reduction, "
      "ScalarType loss_dtype, bool statistics) "
      "-> (Tensor loss, Tensor row_max, Tensor log_sum, Tensor entropy, Tensor argmax)");
  m.def(
      "scale_gradient_(Tensor(a!) grad_logits, Tensor grad_loss, Tensor target, "
      "Tensor? token_weight, int dim, int ignore_index) -> ()");
}

}  // namespace fused_xent::binding
