// The operators on the CPU.
#include <stdexcept>
#include <tuple>

#include "../cpu/kernels.h"
#include "../cpu/launch.h"
#include "huge_pages.h"
#include "tensors.h"

namespace fused_xent::binding {
namespace {

using OptionalTensor = std::optional<Tensor>;

cpu::Threads torch_threads() {
  return {torch::stable::get_num_threads(),
          [](int64_t count, const std::function<void(int64_t)>& body) {
            torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) body(i);
            });
          }};
}

// A problem, and the sum of the class weights.
Problem cpu_problem(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                    int64_t dim, int64_t ignore_index, double label_smoothing) {
  Problem problem(logits, target, weight, dim, ignore_index, label_smoothing);
  Params& p = problem.params;
  if (!weight) return problem;
  p.weight_sum = 0;
  for (int64_t j = 0; j < p.vocab_size; ++j) {
    p.weight_sum += p.dtype == DType::float64 ? static_cast<const double*>(p.weight)[j]
                                              : static_cast<const float*>(p.weight)[j];
  }
  return problem;
}

// By what `mean` divides: the kept targets' weights, or the number of rows of probabilities. Throws
// where a target is no class, so that nothing has been written by then.
double total_weight_of(const Problem& problem, const cpu::Threads& threads) {
  const Params& p = problem.params;
  if (p.target_kind == TargetKind::probabilities) return static_cast<double>(p.n_rows);
  const cpu::TargetScan scan = cpu::scan_targets(p, threads);
  if (scan.bad_row < 0) return scan.total_weight;
  throw std::out_of_range("target must be in [0, " + std::to_string(p.vocab_size) +
                          ") or equal to ignore_index (" + std::to_string(p.ignore_index) +
                          "), got " + std::to_string(cpu::target_index(p, scan.bad_row)) +
                          " at position " + problem.position(scan.bad_row));
}

double grad_scale(int64_t reduction, double total_weight) {
  return reduction == kMean ? mean_of(1, total_weight) : 1;
}

Tensor reduce(const Problem& problem, const Tensor& row_loss, int64_t reduction,
              double total_weight, ScalarType loss_dtype, const cpu::Threads& threads) {
  if (reduction == kNone) return torch::stable::to(row_loss, loss_dtype);
  const double sum = cpu::sum_rows(problem.params, threads);
  const double loss =
      reduction == kMean ? mean_of(sum, total_weight) : sum;  // may be beyond loss_dtype
  return torch::stable::to(torch::stable::full({}, loss, ScalarType::Double), loss_dtype);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& logits, const Tensor& target, const OptionalTensor& weight, int64_t dim,
    int64_t ignore_index, double label_smoothing, int64_t reduction, ScalarType loss_dtype) {
  check_reduction(reduction, loss_dtype);
  Problem problem = cpu_problem(logits, target, weight, dim, ignore_index, label_smoothing);
  const cpu::Threads threads = torch_threads();
  const double total_weight = total_weight_of(problem, threads);
  const Rows rows(problem, problem.params);
  cpu::forward(problem.params, threads);
  return {reduce(problem, rows.loss, reduction, total_weight, loss_dtype, threads),
          torch::stable::full({}, total_weight, ScalarType::Double), rows.max, rows.log_sum,
          rows.label_mass};
}

void backward_into(const Tensor& grad_logits, const Tensor& grad_loss, const Tensor& logits,
                   const Tensor& target, const OptionalTensor& weight, const Tensor& total_weight,
                   const Tensor& row_max, const Tensor& log_sum, const Tensor& label_mass,
                   int64_t dim, int64_t ignore_index, double label_smoothing, int64_t reduction) {
  Problem problem = cpu_problem(logits, target, weight, dim, ignore_index, label_smoothing);
  Params& p = problem.params;
  check_reduction(reduction, problem.acc_dtype);
  const cpu::Threads threads = torch_threads();
  total_weight_of(problem, threads);  // the targets, once more
  check(total_weight.dim() == 0 && total_weight.scalar_type() == ScalarType::Double,
        "total_weight must be a float64 scalar");
  p.row_max = problem.check_rows("row_max", row_max).data_ptr();
  p.log_sum = problem.check_rows("log_sum", log_sum).data_ptr();
  if (p.target_kind == TargetKind::probabilities) {
    p.label_mass = problem.check_rows("label_mass", label_mass).data_ptr();
  }
  const Tensor upstream = problem.set_grad_loss(p, grad_loss);
  p.grad_scale = grad_scale(reduction, *static_cast<const double*>(total_weight.const_data_ptr()));
  set_grad_logits(p, "grad_logits", grad_logits, dim);
  cpu::backward(p, threads);
}

Tensor backward(const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                const OptionalTensor& weight, const Tensor& total_weight, const Tensor& row_max,
                const Tensor& log_sum, const Tensor& label_mass, int64_t dim, int64_t ignore_index,
                double label_smoothing, int64_t reduction) {
  check(0 <= dim && dim < logits.dim(), "dim must be a dimension of logits");
  const Tensor grad_logits = empty_gradient(logits, dim);
  advise_huge_pages(grad_logits.mutable_data_ptr(), grad_logits.numel() * logits.element_size());
  backward_into(grad_logits, grad_loss, logits, target, weight, total_weight, row_max, log_sum,
                label_mass, dim, ignore_index, label_smoothing, reduction);
  return grad_logits;
}

void backward_(const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
               const OptionalTensor& weight, const Tensor& total_weight, const Tensor& row_max,
               const Tensor& log_sum, const Tensor& label_mass, int64_t dim, int64_t ignore_index,
               double label_smoothing, int64_t reduction) {
  backward_into(logits, grad_loss, logits, target, weight, total_weight, row_max, log_sum,
                label_mass, dim, ignore_index, label_smoothing, reduction);
}

Tensor forward_backward_(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                         int64_t dim, int64_t ignore_index, double label_smoothing,
                         int64_t reduction, ScalarType loss_dtype) {
  check_reduction(reduction, loss_dtype);
  Problem problem = cpu_problem(logits, target, weight, dim, ignore_index, label_smoothing);
  Params& p = problem.params;
  const cpu::Threads threads = torch_threads();
  const double total_weight = total_weight_of(problem, threads);
  set_grad_logits(p, "logits", logits, dim);
  const Rows rows(problem, p);
  const Tensor one = problem.set_grad_loss(p, torch::stable::full({}, 1, problem.acc_dtype));
  p.grad_scale = grad_scale(reduction, total_weight);
  cpu::forward_backward(p, threads);
  return reduce(problem, rows.loss, reduction, total_weight, loss_dtype, threads);
}

void scale_gradient_(const Tensor& grad_logits, const Tensor& grad_loss, const Tensor& target,
                     int64_t dim, int64_t ignore_index) {
  Problem problem(grad_logits, target, std::nullopt, dim, ignore_index, 0);
  Params& p = problem.params;
  const Tensor upstream = problem.set_grad_loss(p, grad_loss);
  p.grad_scale = 1;
  set_grad_logits(p, "grad_logits", grad_logits, dim);
  cpu::scale_gradient(p, torch_threads());
}

std::string cpu_capability() { return cpu::capability_name(); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_xent, CPU, m) {
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("backward", TORCH_BOX(&backward));
  m.impl("backward_", TORCH_BOX(&backward_));
  m.impl("forward_backward_", TORCH_BOX(&forward_backward_));
  m.impl("scale_gradient_", TORCH_BOX(&scale_gradient_));
}

STABLE_TORCH_LIBRARY_IMPL(fused_xent, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}

}  // namespace fused_xent::binding
