// The operators on the CPU.
#include <stdexcept>

#include "../cpu/kernels.h"
#include "../cpu/launch.h"
#include "huge_pages.h"
#include "operators.h"

namespace fused_xent::binding {
namespace {

cpu::Threads torch_threads() {
  return {torch::stable::get_num_threads(),
          [](int64_t count, const std::function<void(int64_t)>& body) {
            torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) body(i);
            });
          }};
}

double value_of(const Tensor& scalar) {
  return *static_cast<const double*>(scalar.const_data_ptr());
}

struct Call {
  Problem problem;
  Params& params;
  const cpu::Threads threads;

  Call(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
       const OptionalTensor& token_weight, int64_t dim, int64_t ignore_index,
       const Numbers& numbers)
      : problem(logits, target, weight, token_weight, dim, ignore_index, numbers),
        params(problem.params),
        threads(torch_threads()) {
    if (!weight) return;
    params.weight_sum = 0;
    for (int64_t j = 0; j < params.vocab_size; ++j) {
      params.weight_sum += params.dtype == DType::float64
                               ? static_cast<const double*>(params.weight)[j]
                               : static_cast<const float*>(params.weight)[j];
    }
  }
  Call(const Call&) = delete;  // params would be another's

  void prepare(const Tensor& gradient) const {
    advise_huge_pages(gradient.mutable_data_ptr(), gradient.numel() * gradient.element_size());
  }

  std::tuple<Tensor, Tensor> forward(const Rows& rows, const Total& total,
                                     ScalarType loss_dtype) const {
    const double total_weight = total_weight_of(total);
    if (params.vocab_size > 0) cpu::forward(params, threads);
    return {reduce(rows.loss, total.reduction, total_weight, loss_dtype),
            torch::stable::full({}, total_weight, ScalarType::Double)};
  }

  Tensor forward_backward(const Rows& rows, const Total& total, ScalarType loss_dtype) {
    const double total_weight = total_weight_of(total);
    const Tensor one = problem.set_grad_loss(params, torch::stable::full({}, 1, problem.acc_dtype));
    params.grad_scale = total.reduction == kMean ? mean_of(1, total_weight) : 1;
    if (params.vocab_size > 0) cpu::forward_backward(params, threads);
    return reduce(rows.loss, total.reduction, total_weight, loss_dtype);
  }

  void backward(const Tensor* total_weight) {
    scan();  // the targets, once more
    params.grad_scale = total_weight == nullptr ? 1 : mean_of(1, value_of(*total_weight));
    cpu::backward(params, threads);
  }

  void scale_gradient() {
    params.grad_scale = 1;
    cpu::scale_gradient(params, threads);
  }

 private:
  // The rows' weights. Throws where a target is no class, so that nothing has been written by then.
  double scan() const {
    const cpu::RowScan scan = cpu::scan_rows(params, threads);
    if (scan.bad_row < 0) return scan.total_weight;
    throw std::out_of_range("target must be in [0, " + std::to_string(params.vocab_size) +
                            ") or equal to ignore_index (" + std::to_string(params.ignore_index) +
                            "), got " + std::to_string(cpu::target_index(params, scan.bad_row)) +
                            " at position " + problem.position(scan.bad_row));
  }

  double total_weight_of(const Total& total) const {
    const double of_rows = scan();
    return total.normalizer == nullptr ? of_rows : value_of(*total.normalizer);
  }

  Tensor reduce(const Tensor& row_loss, int64_t reduction, double total_weight,
                ScalarType loss_dtype) const {
    if (reduction == kNone) return torch::stable::to(row_loss, loss_dtype);
    const double sum = cpu::sum_rows(params, threads);
    const double loss =
        reduction == kMean ? mean_of(sum, total_weight) : sum;  // may be beyond loss_dtype
    return torch::stable::to(torch::stable::full({}, loss, ScalarType::Double), loss_dtype);
  }
};

std::string cpu_capability() { return cpu::capability_name(); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_xent, CPU, m) { Operators<Call>::implement(m); }

STABLE_TORCH_LIBRARY_IMPL(fused_xent, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}

}  // namespace fused_xent::binding
