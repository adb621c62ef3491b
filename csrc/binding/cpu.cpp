// The operators on the CPU.
#include <stdexcept>

#include "../cpu/kernels.h"
#include "../cpu/launch.h"
#include "gradient_memory.h"
#include "operators.h"
#include "shards.h"

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

struct Call {
  Problem problem;
  Params& params = problem.params;
  const cpu::Threads threads = torch_threads();
  OptionalTensor one;  // the upstream gradient of forward_backward

  explicit Call(Problem checked) : problem(std::move(checked)) {
    if (!problem.weight) return;
    params.weight_sum = 0;
    for (int64_t j = 0; j < params.vocab_size; ++j) params.weight_sum += class_weight(params, j);
  }
  Call(const Call&) = delete;  // params would be another's

  Tensor new_gradient() const {
    const Tensor& logits = problem.logits;
    const int64_t bytes = logits.numel() * logits.element_size();
    if (bytes >= kLeastKept && keeps_gradients()) {
      return on_kept_memory(empty_gradient(without_memory(logits), problem.dim, false));
    }
    const Tensor gradient = empty_gradient(logits, problem.dim, false);
    advise_huge_pages(gradient.mutable_data_ptr(), bytes);
    return gradient;
  }

  // Throws where a label is on no class.
  void read_labels(bool keep_logits) {
    if (problem.sparse.n_labels == 0) return;
    const cpu::BadLabel bad = cpu::find_bad_label(params, problem.sparse, threads);
    if (bad.row >= 0) {
      refuse_class("target_indices", problem.sparse.ignore_index, bad.its_class,
                   problem.position(bad.row, bad.label));
    }
    problem.allocate_labels(params, keep_logits);
    cpu::read_labels(params, problem.sparse, threads);
  }

  void write_label_gradients() const {
    if (problem.sparse.logits == nullptr) return;
    cpu::write_label_gradients(params, problem.sparse, threads);
  }

  void select() const {
    cpu::forward(params, threads);
    cpu::write_log_probs(params, problem.sparse, threads);
  }

  Tensor loss(const Rows& rows, ScalarType loss_dtype) const {
    return loss_by(total_weight_of_rows(), rows, loss_dtype);
  }

  std::tuple<Tensor, Tensor> forward(const Rows& rows, ScalarType loss_dtype) const {
    const double total_weight = total_weight_of_rows();
    return {loss_by(total_weight, rows, loss_dtype), filled(total_weight, ScalarType::Double)};
  }

  Tensor forward_backward(const Rows& rows, ScalarType loss_dtype) {
    const double total_weight = total_weight_of_rows();
    one = problem.set_grad_loss(params, filled(1, problem.acc_dtype));
    params.grad_scale = problem.reduction == kMean ? mean_of(1, total_weight) : 1;
    if (params.vocab_size > 0) cpu::forward_backward(params, threads);
    return reduce(rows.loss, total_weight, loss_dtype);
  }

  void backward() {
    scan();  // the targets, once more
    params.grad_scale = problem.reduction == kMean ? mean_of(1, normalizer()) : 1;
    cpu::backward(params, threads);
  }

  void scale_gradient() const { cpu::scale_gradient(params, threads); }

 private:
  // Throws Python's IndexError.
  [[noreturn]] void refuse_class(const char* argument, int64_t ignore_index, int64_t given,
                                 const std::string& position) const {
    throw std::out_of_range(std::string(argument) + " must be in [0, " +
                            std::to_string(params.vocab_size) + ") or equal to ignore_index (" +
                            std::to_string(ignore_index) + "), got " + std::to_string(given) +
                            " at position " + position);
  }

  // The rows' weights. Throws where a target is no class, so that nothing has been written by then.
  double scan() const {
    if (problem.sparse.n_labels > 0) {  // classes are in range, and rows weigh their token weights
      Params rows = params;
      rows.target_kind = TargetKind::probabilities;
      return cpu::scan_rows(rows, threads).total_weight;
    }
    const cpu::RowScan scan = cpu::scan_rows(params, threads);
    if (scan.bad_row < 0) return scan.total_weight;
    refuse_class("target", params.ignore_index, target_index(params, scan.bad_row),
                 problem.position(scan.bad_row));
  }

  double normalizer() const {
    return *static_cast<const double*>(problem.normalizer->const_data_ptr());
  }

  double total_weight_of_rows() const {
    const double of_rows = scan();
    return problem.normalizer ? normalizer() : of_rows;
  }

  Tensor loss_by(double total_weight, const Rows& rows, ScalarType loss_dtype) const {
    if (params.vocab_size > 0) cpu::forward(params, threads);
    return reduce(rows.loss, total_weight, loss_dtype);
  }

  // A scalar of the value, which may be beyond the dtype.
  Tensor filled(double value, ScalarType dtype) const {
    const bool is_float = dtype == ScalarType::Float;
    const Tensor scalar = problem.scalar(is_float ? dtype : ScalarType::Double);
    if (is_float) {
      *static_cast<float*>(scalar.mutable_data_ptr()) = static_cast<float>(value);
    } else {
      *static_cast<double*>(scalar.mutable_data_ptr()) = value;
    }
    return is_float || dtype == ScalarType::Double ? scalar : torch::stable::to(scalar, dtype);
  }

  Tensor reduce(const Tensor& row_loss, double total_weight, ScalarType loss_dtype) const {
    if (problem.reduction == kNone) {
      return loss_dtype == problem.acc_dtype ? row_loss : torch::stable::to(row_loss, loss_dtype);
    }
    const double sum = cpu::sum_rows(params, threads);
    return filled(problem.reduction == kMean ? mean_of(sum, total_weight) : sum, loss_dtype);
  }
};

void add_up(const Shards& shards, const Tensor&) { cpu::add_up_shards(shards, torch_threads()); }

std::string cpu_capability() { return cpu::capability_name(); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_xent, CPU, m) {
  Operators<Call>::implement(m);
  m.impl("add_up_shards", &add_up_shards<add_up>);
}

STABLE_TORCH_LIBRARY_IMPL(fused_xent, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
  m.impl("empty_cache", TORCH_BOX(&empty_cache));
}

}  // namespace fused_xent::binding
