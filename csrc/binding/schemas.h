// The operators, for every device. Python (fused_xent/_ops.py) gives their meaning and their meta
// implementations; cpu.cpp and cuda.cpp implement them.
#pragma once

#include <torch/csrc/stable/library.h>

namespace fused_xent::binding {

template <typename Library>
void define_operators(Library& m) {
  m.def(
      "forward(Tensor logits, Tensor target, Tensor? weight, int dim, int ignore_index, "
      "float label_smoothing, int reduction, ScalarType loss_dtype) "
      "-> (Tensor loss, Tensor total_weight, Tensor row_max, Tensor log_sum, Tensor label_mass)");
  m.def(
      "backward(Tensor grad_loss, Tensor logits, Tensor target, Tensor? weight, "
      "Tensor total_weight, Tensor row_max, Tensor log_sum, Tensor label_mass, int dim, "
      "int ignore_index, float label_smoothing, int reduction) -> Tensor grad_logits");
  m.def(
      "backward_(Tensor grad_loss, Tensor(a!) logits, Tensor target, Tensor? weight, "
      "Tensor total_weight, Tensor row_max, Tensor log_sum, Tensor label_mass, int dim, "
      "int ignore_index, float label_smoothing, int reduction) -> ()");
  m.def(
      "forward_backward_(Tensor(a!) logits, Tensor target, Tensor? weight, int dim, "
      "int ignore_index, float label_smoothing, int reduction, ScalarType loss_dtype) "
      "-> Tensor loss");
  m.def(
      "scale_gradient_(Tensor(a!) grad_logits, Tensor grad_loss, Tensor target, int dim, "
      "int ignore_index) -> ()");
}

}  // namespace fused_xent::binding
