// The operators' schemas, for every device. fused_xent/_ops.py says what each operator means and
// has the meta implementations; operators.h reads the arguments; cpu.cpp and cuda.cpp implement
// them.
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>

#include "../xent_params.h"

namespace fused_xent::binding {

// One schema per operator. The options of a loss are keyword-only, in the order of
// FUSED_XENT_OPTIONS.
template <typename Library>
void define_operators(Library& m) {
#define FUSED_XENT_SCHEMA(type, schema_type, name, default_value) \
  ", " schema_type " " #name "=" #default_value
  const std::string options = ", *" FUSED_XENT_OPTIONS(FUSED_XENT_SCHEMA);
#undef FUSED_XENT_SCHEMA
  const std::string sparse = ", Tensor? target_indices=None";
  const std::string labels = " logits, Tensor target, Tensor? weight, Tensor? token_weight, ";
  const std::string of_loss =
      labels + "Tensor? normalizer, int dim, int reduction, ScalarType? loss_dtype=None" + sparse +
      options;
  const std::string of_backward = labels +
                                  "Tensor? total_weight, int dim, int reduction, Tensor state, "
                                  "Tensor? entropy, Tensor? grad_loss, Tensor? grad_lse, "
                                  "Tensor? grad_entropy" +
                                  sparse + options;
  const std::string statistics = ", Tensor lse, Tensor entropy, Tensor argmax)";
  const auto define = [&m](const std::string& schema) { m.def(schema.c_str()); };
  // inplace_backward is read by the autograd formula alone.
  const std::string inplace =
      ", bool inplace_backward=False) -> (Tensor loss, Tensor total_weight, ";
  define("loss(Tensor" + of_loss + ") -> Tensor loss");
  define("forward(Tensor" + of_loss + inplace + "Tensor state)");
  define("forward_with_statistics(Tensor" + of_loss + inplace + "Tensor state" + statistics);
  define("backward(Tensor" + of_backward + ") -> Tensor grad_logits");
  define("backward_(Tensor(a!)" + of_backward + ") -> ()");
  define("forward_backward_(Tensor(a!)" + of_loss + ") -> Tensor loss");
  define("forward_backward_with_statistics_(Tensor(a!)" + of_loss + ") -> (Tensor loss" +
         statistics);
  define(
      "selected_log_probs(Tensor logits, Tensor target_indices, int dim, bool with_entropy, *, "
      "int ignore_index=-100, float softcap=0.0, float logit_scale=1.0, "
      "bool inplace_backward=False) -> (Tensor log_probs, Tensor state, Tensor token_weight, "
      "Tensor entropy)");
  define(
      "scale_gradient_(Tensor(a!) grad_logits, Tensor grad_loss, Tensor target, "
      "Tensor? token_weight, int dim, int ignore_index) -> ()");
  define(
      "add_up_shards(Tensor max, Tensor log_sum, Tensor? part, Tensor? label_mass, "
      "Tensor? entropy, Tensor? argmax, Tensor? first_class, Tensor? end_class, "
      "Tensor? token_weight, Tensor? is_bad, int rank, int n_classes, bool keeps_mass, *, "
      "float lse_square_scale=0.0, float focal_gamma=0.0) -> (Tensor state, Tensor rise, "
      "Tensor loss, Tensor other_mass, Tensor lse, Tensor entropy, Tensor argmax)");
  define("multiply_(Tensor(a!) gradient, Tensor factor) -> ()");
}

}  // namespace fused_xent::binding
