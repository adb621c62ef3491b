#include "cuda.h"

#include <map>
#include <mutex>
#include <stdexcept>
#include <tuple>

#include "../cuda/launch.h"
#include "cuda_device.h"
#include "tensors.h"

namespace fused_xent::binding {
namespace {

using OptionalTensor = std::optional<Tensor>;
using cuda::Plan;

void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": CUDA error: " + cudaGetErrorString(error));
}

// ---- plans -----------------------------------------------------------------------------------

std::mutex forced_mutex;
std::map<std::string, Plan> forced_plans;

Plan plan_for(const char* operation, Plan (*choose)(const cuda::Shape&, const cuda::Device&),
              const cuda::Arguments& a) {
  cuda::Device device{};
  check_cuda(cuda::describe_device(&device), operation);
  check(device.capability >= cuda::kLeastCapability,
        "logits must be on a CUDA device of compute capability 8.0 or more, got " +
            std::to_string(device.capability / 10) + "." + std::to_string(device.capability % 10));
  const cuda::Shape shape = cuda::shape_of(a);
  const std::lock_guard<std::mutex> lock(forced_mutex);
  const auto forced = forced_plans.find(operation);
  if (forced == forced_plans.end()) return choose(shape, device);
  const char* why = cuda::why_not(forced->second, shape, device);
  check(why == nullptr, std::string("plan of ") + operation + ": " + (why == nullptr ? "" : why));
  return forced->second;
}

// ---- one call of an operator -----------------------------------------------------------------

struct Call {
  DeviceGuard guard;
  Problem problem;
  cuda::Arguments a{};
  cudaStream_t stream;
  Tensor scratch;  // for the class weights' sum, and for partial sums over rows

  Call(const Tensor& logits, const Tensor& target, const OptionalTensor& weight, int64_t dim,
       int64_t ignore_index, double label_smoothing)
      : guard(logits),
        problem(logits, target, weight, dim, ignore_index, label_smoothing),
        stream(static_cast<cudaStream_t>(current_stream(logits))),
        scratch(torch::stable::new_empty(problem.logits, {1 + 2 * cuda::kMaxSumBlocks},
                                         ScalarType::Double)) {
    static_cast<Params&>(a) = problem.params;
    check(a.n_rows <= cuda::kMaxRows && a.vocab_size <= cuda::kMaxClasses,
          "logits must have less than 2^31 rows and at most 2^30 classes on CUDA devices, got " +
              std::to_string(a.n_rows) + " and " + std::to_string(a.vocab_size));
    if (weight && has_indices() && label_smoothing != 0) {
      a.weight_sum_on_device = scratch_data();
      check_cuda(cuda::sum_class_weights(a, scratch_data(), stream), "sum of weight");
    }
  }

  bool has_indices() const { return a.target_kind != TargetKind::probabilities; }
  double* scratch_data() const { return static_cast<double*>(scratch.mutable_data_ptr()); }

  // The sum over row_loss, if a loss is wanted, and of the kept rows' weights.
  void sum_rows(double* total_weight, const Tensor* loss, int64_t reduction,
                DType loss_dtype) const {
    const cuda::Sums sums{total_weight, loss == nullptr ? nullptr : loss->mutable_data_ptr(),
                          loss_dtype, reduction == kMean, static_cast<double>(a.n_rows)};
    check_cuda(cuda::sum_rows(a, sums, scratch_data() + 1, stream), "sum over rows");
  }

  Tensor scalar(ScalarType dtype) const {
    return torch::stable::new_empty(problem.logits, {}, dtype);
  }

  // The reduced loss. Writes total_weight where it is not null.
  Tensor reduce(const Tensor& row_loss, double* total_weight, int64_t reduction,
                ScalarType loss_dtype) const {
    if (reduction == kNone) {
      if (total_weight != nullptr) sum_rows(total_weight, nullptr, kSum, DType::float32);
      return torch::stable::to(row_loss, loss_dtype);
    }
    const Tensor loss = scalar(loss_dtype);
    sum_rows(total_weight, &loss, reduction, dtype_of("loss", loss));
    return loss;
  }
};

// Labels on no classes have loss 0, and there is nothing to read.
bool is_empty(const cuda::Arguments& a) {
  return a.vocab_size == 0 && a.target_kind == TargetKind::probabilities;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& logits, const Tensor& target, const OptionalTensor& weight, int64_t dim,
    int64_t ignore_index, double label_smoothing, int64_t reduction, ScalarType loss_dtype) {
  check_reduction(reduction, loss_dtype);
  Call call(logits, target, weight, dim, ignore_index, label_smoothing);
  cuda::Arguments& a = call.a;
  const Rows rows(call.problem, a);
  if (!is_empty(a)) {
    const Plan plan = plan_for("forward", cuda::plan_forward, a);
    const Tensor workspace = torch::stable::new_empty(
        call.problem.logits, {cuda::workspace_bytes(a, plan)}, ScalarType::Byte);
    check_cuda(cuda::forward(a, plan, workspace.mutable_data_ptr(), call.stream), "forward");
  }
  const Tensor total_weight = call.scalar(ScalarType::Double);
  const Tensor loss = call.reduce(rows.loss, static_cast<double*>(total_weight.mutable_data_ptr()),
                                  reduction, loss_dtype);
  return {loss, total_weight, rows.max, rows.log_sum, rows.label_mass};
}

void backward_into(const Tensor& grad_logits, const Tensor& grad_loss, const Tensor& logits,
                   const Tensor& target, const OptionalTensor& weight, const Tensor& total_weight,
                   const Tensor& row_max, const Tensor& log_sum, const Tensor& label_mass,
                   int64_t dim, int64_t ignore_index, double label_smoothing, int64_t reduction) {
  Call call(logits, target, weight, dim, ignore_index, label_smoothing);
  const Problem& problem = call.problem;
  cuda::Arguments& a = call.a;
  check_reduction(reduction, problem.acc_dtype);
  problem.check_device("total_weight", total_weight);
  check(total_weight.dim() == 0 && total_weight.scalar_type() == ScalarType::Double,
        "total_weight must be a float64 scalar");
  a.row_max = problem.check_rows("row_max", row_max).data_ptr();
  a.log_sum = problem.check_rows("log_sum", log_sum).data_ptr();
  if (!call.has_indices()) {
    a.label_mass = problem.check_rows("label_mass", label_mass).data_ptr();
  }
  const Tensor upstream = problem.set_grad_loss(a, grad_loss);
  a.grad_scale = 1;
  if (reduction == kMean) {
    a.total_weight = static_cast<const double*>(total_weight.const_data_ptr());
  }
  set_grad_logits(a, "grad_logits", grad_logits, dim);
  if (a.vocab_size == 0) return;
  const Plan plan = plan_for("backward", cuda::plan_backward, a);
  check_cuda(cuda::backward(a, plan, call.stream), "backward");
}

Tensor backward(const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                const OptionalTensor& weight, const Tensor& total_weight, const Tensor& row_max,
                const Tensor& log_sum, const Tensor& label_mass, int64_t dim, int64_t ignore_index,
                double label_smoothing, int64_t reduction) {
  check(0 <= dim && dim < logits.dim(), "dim must be a dimension of logits");
  const Tensor grad_logits = empty_gradient(logits, dim);
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
  Call call(logits, target, weight, dim, ignore_index, label_smoothing);
  cuda::Arguments& a = call.a;
  set_grad_logits(a, "logits", logits, dim);
  const Tensor row_loss = call.problem.empty_rows();
  a.row_loss = row_loss.mutable_data_ptr();
  a.grad_scale = 1;
  const Tensor total_weight = call.scalar(ScalarType::Double);
  if (reduction == kMean) {
    auto* total = static_cast<double*>(total_weight.mutable_data_ptr());
    call.sum_rows(total, nullptr, kSum, DType::float32);
    a.total_weight = total;
  }
  if (is_empty(a)) {
    Tensor rows = row_loss;
    torch::stable::zero_(rows);
  } else {
    const Plan plan = plan_for("forward_backward", cuda::plan_forward_backward, a);
    check_cuda(cuda::forward_backward(a, plan, call.stream), "forward_backward");
  }
  return call.reduce(row_loss, nullptr, reduction, loss_dtype);
}

void scale_gradient_(const Tensor& grad_logits, const Tensor& grad_loss, const Tensor& target,
                     int64_t dim, int64_t ignore_index) {
  Call call(grad_logits, target, std::nullopt, dim, ignore_index, 0);
  cuda::Arguments& a = call.a;
  const Tensor upstream = call.problem.set_grad_loss(a, grad_loss);
  a.grad_scale = 1;
  set_grad_logits(a, "grad_logits", grad_logits, dim);
  if (a.vocab_size == 0) return;
  const Plan plan = plan_for("backward", cuda::plan_backward, a);
  check_cuda(cuda::scale_gradient(a, plan, call.stream), "scale_gradient");
}

}  // namespace

void implement_on_cuda(torch::stable::detail::StableLibrary& m) {
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("backward", TORCH_BOX(&backward));
  m.impl("backward_", TORCH_BOX(&backward_));
  m.impl("forward_backward_", TORCH_BOX(&forward_backward_));
  m.impl("scale_gradient_", TORCH_BOX(&scale_gradient_));
}

void force_cuda_plan(const std::string& operation, const std::vector<int64_t>& plan) {
  const std::lock_guard<std::mutex> lock(forced_mutex);
  check(operation == "forward" || operation == "backward" || operation == "forward_backward",
        "operation must be 'forward', 'backward' or 'forward_backward', got '" + operation + "'");
  forced_plans.erase(operation);
  if (plan.empty()) return;
  check(plan.size() == 8, "plan must have 8 members or none, got " + std::to_string(plan.size()));
  check(0 <= plan[0] && plan[0] <= 3, "plan's regime must be 0 to 3");
  const auto at = [&](int i) { return static_cast<int>(plan[i]); };
  forced_plans[operation] =
      Plan{static_cast<cuda::Regime>(plan[0]), at(1), at(2), at(3), at(4), at(5), at(6), at(7)};
}

}  // namespace fused_xent::binding
