#include "cuda.h"

#include <map>
#include <mutex>
#include <stdexcept>

#include "../cuda/launch.h"
#include "cuda_device.h"
#include "operators.h"
#include "shards.h"

namespace fused_xent::binding {
namespace {

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
  FUSED_XENT_CHECK(device.capability >= cuda::kLeastCapability,
                   "logits must be on a CUDA device of compute capability 8.0 or more, got " +
                       std::to_string(device.capability / 10) + "." +
                       std::to_string(device.capability % 10));
  const cuda::Shape shape = cuda::shape_of(a);
  const std::lock_guard<std::mutex> lock(forced_mutex);
  const auto forced = forced_plans.find(operation);
  if (forced == forced_plans.end()) return choose(shape, device);
  const char* why = cuda::why_not(forced->second, shape, device);
  FUSED_XENT_CHECK(why == nullptr, std::string("plan of ") + operation + ": " + why);
  return forced->second;
}

// ---- one call of an operator -----------------------------------------------------------------

struct Call {
  Problem problem;
  DeviceGuard guard;
  cuda::Arguments params{};
  cudaStream_t stream;
  Tensor scratch;              // for the class weights' sum, and for partial sums over rows
  OptionalTensor rows_weight;  // the divisor of forward_backward's gradient, if it computes one

  explicit Call(Problem checked)
      : problem(std::move(checked)),
        guard(problem.logits),
        stream(static_cast<cudaStream_t>(current_stream(problem.logits))),
        scratch(problem.empty({1 + 2 * cuda::kMaxSumBlocks}, ScalarType::Double)) {
    static_cast<Params&>(params) = problem.params;
    FUSED_XENT_CHECK(
        params.n_rows <= cuda::kMaxRows && params.vocab_size <= cuda::kMaxClasses,
        "logits must have less than 2^31 rows and at most 2^30 classes on CUDA devices, got " +
            std::to_string(params.n_rows) + " and " + std::to_string(params.vocab_size));
    if (problem.weight && has_indices(params) && params.label_smoothing != 0) {
      params.weight_sum_on_device = scratch_data();
      check_cuda(cuda::sum_class_weights(params, scratch_data(), sums_workspace(), stream),
                 "sum of weight");
    }
    if (problem.reduction == kMean && problem.normalizer)
      params.total_weight = data_of(*problem.normalizer);
  }

  Tensor new_gradient() const { return empty_gradient(problem.logits, problem.dim, true); }

  void read_labels(bool keep_logits) {
    if (!is_sparse()) return;
    problem.allocate_labels(params, keep_logits);
    check_cuda(cuda::read_labels(params, problem.sparse, stream), "read_labels");
  }

  void write_label_gradients() const {
    if (problem.sparse.logits == nullptr) return;
    check_cuda(cuda::write_label_gradients(params, problem.sparse, stream),
               "write_label_gradients");
  }

  void select() const {
    run_forward();
    check_cuda(cuda::write_log_probs(params, problem.sparse, stream), "write_log_probs");
  }

  Tensor loss(const Rows& rows, ScalarType loss_dtype) {
    run_forward();
    return reduce(rows.loss, nullptr, loss_dtype);
  }

  // The kernel that adds up the losses writes the total weight. Of losses that are not added it is
  // 0: another value would take a launch, and only backward of a mean reads it.
  std::tuple<Tensor, Tensor> forward(const Rows& rows, ScalarType loss_dtype) {
    const Tensor total_weight = problem.scalar(ScalarType::Double);
    const bool is_none = problem.reduction == kNone;
    const bool has_kernel = !is_empty() && params.n_rows > 0;
    if (is_none && has_kernel) params.unread_total_weight = data_of(total_weight);
    run_forward();
    if (is_none && !has_kernel) sum_rows(&total_weight, nullptr);
    return {reduce(rows.loss, &total_weight, loss_dtype), total_weight};
  }

  Tensor forward_backward(const Rows& rows, ScalarType loss_dtype) {
    if (problem.reduction == kMean && params.total_weight == nullptr) {
      rows_weight = problem.scalar(ScalarType::Double);
      sum_rows(&*rows_weight, nullptr);  // the gradient needs it before the loss is known
      params.total_weight = data_of(*rows_weight);
    }
    if (!is_empty()) {
      const Plan plan = plan_for("forward_backward", cuda::plan_forward_backward, params);
      check_cuda(cuda::forward_backward(params, plan, stream), "forward_backward");
    }
    return reduce(rows.loss, nullptr, loss_dtype);
  }

  void backward() {
    const Plan plan = plan_for("backward", cuda::plan_backward, params);
    check_cuda(cuda::backward(params, plan, stream), "backward");
  }

  void scale_gradient() {
    const Plan plan = plan_for("backward", cuda::plan_backward, params);
    check_cuda(cuda::scale_gradient(params, plan, stream), "scale_gradient");
  }

 private:
  bool is_sparse() const { return problem.sparse.n_labels > 0; }
  // Labels on no classes have loss 0, and there is nothing to read.
  bool is_empty() const { return params.vocab_size == 0 && !has_indices(params); }

  static double* data_of(const Tensor& scalar) {
    return static_cast<double*>(scalar.mutable_data_ptr());
  }
  double* scratch_data() const { return data_of(scratch); }
  double* sums_workspace() const { return scratch_data() + 1; }

  void run_forward() const {
    if (is_empty()) return;
    const Plan plan = plan_for("forward", cuda::plan_forward, params);
    const Tensor workspace = problem.empty({cuda::workspace_bytes(params, plan)}, ScalarType::Byte);
    check_cuda(cuda::forward(params, plan, workspace.mutable_data_ptr(), stream), "forward");
  }

  // The reduced loss and the total weight, where they are wanted.
  void sum_rows(const Tensor* total_weight, const Tensor* loss) const {
    const cuda::Sums sums{total_weight == nullptr ? nullptr : data_of(*total_weight),
                          loss == nullptr ? nullptr : loss->mutable_data_ptr(),
                          loss == nullptr ? DType::float32 : dtype_of("loss", loss->scalar_type()),
                          problem.reduction == kMean};
    cuda::Arguments rows = params;
    // Rows of sparse labels weigh their token weights, whatever their classes.
    if (is_sparse()) rows.target_kind = TargetKind::probabilities;
    check_cuda(cuda::sum_rows(rows, sums, sums_workspace(), stream), "sum over rows");
  }

  // The reduced loss. Writes the total weight, if not null, of losses that are added.
  Tensor reduce(const Tensor& row_loss, const Tensor* total_weight, ScalarType loss_dtype) const {
    if (problem.reduction == kNone) return torch::stable::to(row_loss, loss_dtype);
    const Tensor loss = problem.scalar(loss_dtype);
    sum_rows(total_weight, &loss);
    return loss;
  }
};

void add_up(const Shards& shards, const Tensor& tensor) {
  const DeviceGuard guard(tensor);
  const auto stream = static_cast<cudaStream_t>(current_stream(tensor));
  check_cuda(cuda::add_up_shards(shards, stream), "add_up_shards");
}

}  // namespace

void implement_on_cuda(torch::stable::detail::StableLibrary& m) {
  Operators<Call>::implement(m);
  m.impl("add_up_shards", &add_up_shards<add_up>);
}

void force_cuda_plan(const std::string& operation, const std::vector<int64_t>& plan) {
  const std::lock_guard<std::mutex> lock(forced_mutex);
  FUSED_XENT_CHECK(
      operation == "forward" || operation == "backward" || operation == "forward_backward",
      "operation must be 'forward', 'backward' or 'forward_backward', got '" + operation + "'");
  forced_plans.erase(operation);
  if (plan.empty()) return;
  FUSED_XENT_CHECK(plan.size() == 8,
                   "plan must have 8 members or none, got " + std::to_string(plan.size()));
  FUSED_XENT_CHECK(0 <= plan[0] && plan[0] <= 3, "plan's regime must be 0 to 3");
  FUSED_XENT_CHECK(operation != "forward_backward" || (plan[3] & (plan[3] - 1)) == 0,
                   "plan's parts must be a power of two in forward_backward, a size of clusters");
  const auto at = [&](int i) { return static_cast<int>(plan[i]); };
  forced_plans[operation] =
      Plan{static_cast<cuda::Regime>(plan[0]), at(1), at(2), at(3), at(4), at(5), at(6), at(7)};
}

// The runtime is linked statically. It works with any driver of its major version, or of a newer
// one.
std::string cuda_driver_problem() {
  int runtime = 0, driver = 0;
  check_cuda(cudaRuntimeGetVersion(&runtime), "version of the runtime");
  check_cuda(cudaDriverGetVersion(&driver), "version of the driver");
  if (driver == 0 || driver / 1000 >= runtime / 1000) return "";
  const std::string needed = std::to_string(runtime / 1000) + ".0";
  const std::string found =
      std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10);
  return "the kernels need a driver for CUDA " + needed + " or newer, got one for CUDA " + found;
}

}  // namespace fused_xent::binding
