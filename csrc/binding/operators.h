// The operators on any device: reads their arguments, checks them, allocates what they return.
//
// Call is one call on a device, cpu.cpp's or cuda.cpp's. It is made of a Problem, and has
//   problem, params
//   loss(rows, loss_dtype)              the loss; fills rows
//   forward(rows, loss_dtype)           the loss and total_weight; fills rows
//   forward_backward(rows, loss_dtype)  the loss; fills rows and params.grad_logits
//   backward()                          fills params.grad_logits
//   scale_gradient()                    multiplies params.grad_logits
//   new_gradient()                      unwritten memory for a gradient: see empty_gradient
//   read_labels(keep_logits)            before the above, for sparse labels; otherwise nothing
//   write_label_gradients()             the same after the above
//   select()                            fills rows and the log-probabilities of selected classes
#pragma once

#include <tuple>

#include "tensors.h"

namespace fused_xent::binding {

// Takes an operator's arguments off the stack, in the order of its schema. Takes all of them before
// anything can throw: each owns its memory.
class Reader {
 public:
  explicit Reader(StableIValue* stack) : next_(stack) {}

  template <typename T>
  T take() {
    return torch::stable::detail::to<T>(*next_++);
  }

  Inputs inputs() {  // braces evaluate from left to right
    return {take<Tensor>(),         take<Tensor>(),  take<OptionalTensor>(), take<OptionalTensor>(),
            take<OptionalTensor>(), take<int64_t>(), take<int64_t>(),        {}};
  }

  Options options() {
    Options options;
#define FUSED_XENT_READ(type, schema_type, name, default_value) options.name = take<type>();
    FUSED_XENT_OPTIONS(FUSED_XENT_READ)
#undef FUSED_XENT_READ
    return options;
  }

 private:
  StableIValue* next_;
};

// Puts an operator's results on the stack.
template <typename... Results>
void return_to(StableIValue* stack, Results... results) {
  ((*stack++ = torch::stable::detail::from(std::move(results))), ...);
}

// The arguments of an operator that computes a loss.
struct LossArguments {
  Inputs inputs;
  std::optional<ScalarType> loss_dtype;
  Options options;

  explicit LossArguments(Reader in)
      : inputs(in.inputs()), loss_dtype(in.take<std::optional<ScalarType>>()) {
    inputs.target_indices = in.take<OptionalTensor>();
    options = in.options();
  }
};

template <typename Call>
struct Operators {
  static void loss(StableIValue* stack, uint64_t, uint64_t) {
    const LossArguments in{Reader(stack)};
    Call call(Problem(in.inputs, in.options));
    call.read_labels(false);
    const Rows rows(call.problem, call.params, false);
    return_to(stack, call.loss(rows, call.problem.loss_dtype(in.loss_dtype)));
  }

  template <bool statistics>
  static void forward(StableIValue* stack, uint64_t, uint64_t) {
    const LossArguments in{Reader(stack)};
    Call call(Problem(in.inputs, in.options));
    call.read_labels(false);
    const Rows rows(call.problem, call.params, statistics);
    auto [loss, total_weight] = call.forward(rows, call.problem.loss_dtype(in.loss_dtype));
    if constexpr (statistics) {
      return_to(stack, loss, total_weight, rows.state, rows.lse(), rows.entropy, rows.argmax);
    } else {
      return_to(stack, loss, total_weight, rows.state);
    }
  }

  template <bool statistics>
  static void forward_backward_(StableIValue* stack, uint64_t, uint64_t) {
    const LossArguments in{Reader(stack)};
    Call call(Problem(in.inputs, in.options));
    set_grad_logits(call.params, "logits", in.inputs.logits, in.inputs.dim);
    call.read_labels(true);
    const Rows rows(call.problem, call.params, statistics);
    const Tensor loss = call.forward_backward(rows, call.problem.loss_dtype(in.loss_dtype));
    call.write_label_gradients();
    if constexpr (statistics) {
      return_to(stack, loss, rows.lse(), rows.entropy, rows.argmax);
    } else {
      return_to(stack, loss);
    }
  }

  template <bool in_place>
  static void backward(StableIValue* stack, uint64_t, uint64_t) {
    Reader in(stack);
    Inputs inputs = in.inputs();
    const Upstream upstream = upstream_of(in);
    inputs.target_indices = in.take<OptionalTensor>();
    Call call(Problem(inputs, in.options()));
    const Tensor grad_logits = in_place ? inputs.logits : call.new_gradient();
    backward_into(grad_logits, call, upstream);
    if constexpr (!in_place) return_to(stack, grad_logits);
  }

  static void selected_log_probs(StableIValue* stack, uint64_t, uint64_t) {
    Reader in(stack);
    const auto logits = in.take<Tensor>();
    const auto classes = in.take<Tensor>();
    const auto dim = in.take<int64_t>();
    const auto with_entropy = in.take<bool>();
    Options options;
    options.ignore_index = in.take<int64_t>();
    options.softcap = in.take<double>();
    options.logit_scale = in.take<double>();
    Call call(Problem(logits, classes, dim, options));
    Problem& problem = call.problem;
    const Tensor token_weight = problem.empty(problem.row_shape, problem.acc_dtype);
    problem.sparse.token_weight = token_weight.mutable_data_ptr();
    call.read_labels(false);
    call.params.token_weight = token_weight.const_data_ptr();
    const Rows rows(problem, call.params, with_entropy);
    const Tensor log_probs = problem.new_log_probs();
    call.select();
    return_to(stack, log_probs, rows.state, token_weight,
              with_entropy ? rows.entropy : problem.empty({0}, problem.acc_dtype));
  }

  static void scale_gradient_(const Tensor& grad_logits, const Tensor& grad_loss,
                              const Tensor& target, const OptionalTensor& token_weight, int64_t dim,
                              int64_t ignore_index) {
    Options options;
    options.ignore_index = ignore_index;
    const Inputs inputs{grad_logits, target, {}, token_weight, {}, dim, kSum, {}};
    scale(Call(Problem(inputs, options)), grad_logits, grad_loss, dim);
  }

  static void multiply_(const Tensor& gradient, const Tensor& factor) {
    FUSED_XENT_CHECK(gradient.dim() > 0 && factor.dim() == 0,
                     "factor must have shape () and gradient a dimension, got shapes " +
                         tuple_of(factor.sizes()) + " and " + tuple_of(gradient.sizes()));
    scale(Call(Problem(gradient, gradient.dim() - 1)), gradient, factor, gradient.dim() - 1);
  }

  template <typename Library>
  static void implement(Library& m) {
    m.impl("loss", &loss);
    m.impl("forward", &forward<false>);
    m.impl("forward_with_statistics", &forward<true>);
    m.impl("backward", &backward<false>);
    m.impl("backward_", &backward<true>);
    m.impl("forward_backward_", &forward_backward_<false>);
    m.impl("forward_backward_with_statistics_", &forward_backward_<true>);
    m.impl("selected_log_probs", &selected_log_probs);
    m.impl("scale_gradient_", TORCH_BOX(&scale_gradient_));
    m.impl("multiply_", TORCH_BOX(&multiply_));
  }

 private:
  struct Upstream {
    Tensor state;
    OptionalTensor entropy, grad_loss, grad_lse, grad_entropy;
  };

  static Upstream upstream_of(Reader& in) {
    return {in.take<Tensor>(), in.take<OptionalTensor>(), in.take<OptionalTensor>(),
            in.take<OptionalTensor>(), in.take<OptionalTensor>()};
  }

  static void backward_into(const Tensor& grad_logits, Call& call, const Upstream& upstream) {
    const Problem& problem = call.problem;
    Params& p = call.params;
    FUSED_XENT_CHECK(problem.reduction != kMean || problem.normalizer,
                     "total_weight must be given where reduction is 1 (mean), got none");
    problem.set_state(p, upstream.state);
    const Tensor grad_loss = problem.set_grad_loss(p, upstream.grad_loss);
    const auto grad_lse = problem.rows_of("grad_lse", upstream.grad_lse, p.grad_lse);
    const auto grad_entropy =
        problem.rows_of("grad_entropy", upstream.grad_entropy, p.grad_entropy);
    FUSED_XENT_CHECK(!grad_entropy || upstream.entropy,
                     "entropy must be given with grad_entropy, got none");
    const auto entropy =
        problem.rows_of("entropy", grad_entropy ? upstream.entropy : std::nullopt, p.entropy);
    set_grad_logits(p, "grad_logits", grad_logits, problem.dim);
    if (p.vocab_size == 0) return;
    call.read_labels(true);
    call.backward();
    call.write_label_gradients();
  }

  static void scale(Call call, const Tensor& gradient, const Tensor& factor, int64_t dim) {
    const Tensor upstream = call.problem.set_grad_loss(call.params, factor);
    set_grad_logits(call.params, "grad_logits", gradient, dim);
    if (call.params.vocab_size > 0) call.scale_gradient();
  }
};

}  // namespace fused_xent::binding
