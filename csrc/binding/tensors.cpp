#include "tensors.h"

#include <algorithm>
#include <stdexcept>

namespace fused_xent::binding {
namespace {

template <typename Values>
std::string tuple_of(const Values& values) {
  std::string text = "(";
  for (const int64_t value : values) text += std::to_string(value) + ", ";
  if (values.size() > 0) text.erase(text.size() - (values.size() == 1 ? 1 : 2));
  return text + ")";
}

std::vector<int64_t> shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

// Every element has an address of its own if each stride steps over all that smaller ones reach.
bool overlaps_itself(const Tensor& tensor) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) == 0) return false;
    if (tensor.size(d) > 1) dims.emplace_back(tensor.stride(d), tensor.size(d));
  }
  std::sort(dims.begin(), dims.end());
  int64_t reach = 0;
  for (const auto& [stride, size] : dims) {
    if (stride <= reach) return true;
    reach += stride * (size - 1);
  }
  return false;
}

// False where more than kMaxRowDims dimensions remain.
bool merge_rows(const Tensor& tensor, int64_t dim, Layout& layout) {
  layout = {0, {}, {}, tensor.stride(dim)};
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    const int64_t size = tensor.size(d), stride = tensor.stride(d);
    if (d == dim || size == 1) continue;
    const int last = layout.n_dims - 1;
    if (last >= 0 && layout.stride[last] == size * stride) {
      layout.size[last] *= size;
      layout.stride[last] = stride;
      continue;
    }
    if (layout.n_dims == kMaxRowDims) return false;
    layout.size[layout.n_dims] = size;
    layout.stride[layout.n_dims++] = stride;
  }
  if (layout.n_dims == 0) layout = {1, {1}, {0}, layout.class_stride};
  return true;
}

TargetKind target_kind(const Tensor& target) {
  switch (target.scalar_type()) {
    case ScalarType::Long:
      return TargetKind::int64;
    case ScalarType::Int:
      return TargetKind::int32;
    case ScalarType::Byte:
      return TargetKind::uint8;
    default:
      return TargetKind::probabilities;
  }
}

}  // namespace

void check(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

DType dtype_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::Double:
      return DType::float64;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Half:
      return DType::float16;
    default:
      throw std::invalid_argument(std::string(name) +
                                  " must be float32, float64, bfloat16 or float16");
  }
}

Layout layout_of(const char* name, const Tensor& tensor, int64_t dim) {
  Layout layout{};
  check(merge_rows(tensor, dim, layout),
        std::string(name) + " must have at most 4 row dimensions that cannot be merged, got " +
            "shape " + tuple_of(tensor.sizes()) + " with strides " + tuple_of(tensor.strides()));
  return layout;
}

Tensor with_layout(const Tensor& tensor, int64_t dim) {
  Layout layout{};
  return merge_rows(tensor, dim, layout) ? tensor : torch::stable::contiguous(tensor);
}

Tensor empty_gradient(const Tensor& logits, int64_t dim) {
  Layout layout{};
  const Tensor gradient = torch::stable::empty_like(logits);
  return merge_rows(gradient, dim, layout) ? gradient
                                           : torch::stable::new_empty(logits, logits.sizes());
}

void check_reduction(int64_t reduction, ScalarType loss_dtype) {
  check(reduction == kNone || reduction == kMean || reduction == kSum,
        "reduction must be 0, 1 or 2, got " + std::to_string(reduction));
  check(loss_dtype == ScalarType::Float || loss_dtype == ScalarType::Double ||
            loss_dtype == ScalarType::BFloat16 || loss_dtype == ScalarType::Half,
        "loss_dtype must be float32, float64, bfloat16 or float16");
}

void set_grad_logits(Params& params, const char* name, const Tensor& tensor, int64_t dim) {
  check(!overlaps_itself(tensor), std::string(name) +
                                      " must have one memory location per element, got strides " +
                                      tuple_of(tensor.strides()));
  params.grad_logits = tensor.mutable_data_ptr();
  params.grad_layout = layout_of(name, tensor, dim);
}

Problem::Problem(const Tensor& logits_, const Tensor& target_, const OptionalTensor& weight_,
                 const OptionalTensor& token_weight_, int64_t dim, int64_t ignore_index,
                 const Numbers& numbers)
    : logits(logits_),
      target(target_),
      weight(weight_),
      token_weight(token_weight_),
      row_shape(shape_of(logits_)) {
  check(numbers.size() == 5, "numbers must be 5, got " + std::to_string(numbers.size()));
  check(0 <= dim && dim < logits.dim(),
        "dim must be in [0, " + std::to_string(logits.dim()) + "), got " + std::to_string(dim));
  params.dtype = dtype_of("logits", logits);
  acc_dtype = params.dtype == DType::float64 ? ScalarType::Double : ScalarType::Float;
  logits = with_layout(logits, dim);
  params.vocab_size = row_shape[dim];
  row_shape.erase(row_shape.begin() + dim);
  params.n_rows = 1;
  for (const int64_t size : row_shape) params.n_rows *= size;
  params.logits = logits.const_data_ptr();
  params.logits_layout = layout_of("logits", logits, dim);
  params.ignore_index = ignore_index;
  params.label_smoothing = numbers[0];
  params.lse_square_scale = numbers[1];
  params.focal_gamma = numbers[2];
  params.softcap = numbers[3];
  params.logit_scale = numbers[4];
  params.weight_sum = static_cast<double>(params.vocab_size);
  if (weight) {
    check_device("weight", *weight);
    check(weight->scalar_type() == acc_dtype && weight->is_contiguous() && weight->dim() == 1 &&
              weight->size(0) == params.vocab_size,
          "weight must be contiguous, of the accumulation type and shape (" +
              std::to_string(params.vocab_size) + ",), got shape " + tuple_of(weight->sizes()));
    params.weight = weight->const_data_ptr();
  }
  if (token_weight) {
    params.token_weight = check_rows("token_weight", *token_weight).const_data_ptr();
  }
  set_target(dim);
}

void Problem::check_device(const char* name, const Tensor& tensor) const {
  check(tensor.device() == logits.device(),
        std::string(name) + " must be on the logits' device, got another one");
}

void Problem::set_target(int64_t dim) {
  check_device("target", target);
  params.target_kind = target_kind(target);
  if (params.target_kind == TargetKind::probabilities) {
    params.target_dtype = dtype_of("target", target);
    check(shape_of(target) == shape_of(logits), "target must have the logits' shape " +
                                                    tuple_of(logits.sizes()) + ", got " +
                                                    tuple_of(target.sizes()));
    const bool half = params.dtype == DType::bfloat16 || params.dtype == DType::float16;
    check(params.target_dtype == params.dtype || (half && params.target_dtype == DType::float32),
          "target must have the logits' dtype, or be float32 under 16-bit logits");
    target = with_layout(target, dim);
    params.target_layout = layout_of("target", target, dim);
  } else {
    check(shape_of(target) == row_shape,
          "target must have shape " + tuple_of(row_shape) + ", got " + tuple_of(target.sizes()));
    target = torch::stable::contiguous(target);
  }
  params.target = target.const_data_ptr();
}

Tensor Problem::empty_rows(ScalarType dtype) const {
  return torch::stable::new_empty(logits, row_shape, dtype);
}

Tensor Problem::no_rows(ScalarType dtype) const {
  return torch::stable::new_empty(logits, {0}, dtype);
}

const Tensor& Problem::check_rows(const char* name, const Tensor& rows) const {
  check_device(name, rows);
  check(shape_of(rows) == row_shape && rows.scalar_type() == acc_dtype && rows.is_contiguous(),
        std::string(name) + " must be contiguous, of the accumulation type and shape " +
            tuple_of(row_shape) + ", got shape " + tuple_of(rows.sizes()));
  return rows;
}

Tensor Problem::set_grad_loss(Params& p, const Tensor& grad_loss) const {
  check_device("grad_loss", grad_loss);
  const bool is_scalar = grad_loss.dim() == 0;
  check(is_scalar || shape_of(grad_loss) == row_shape, "grad_loss must have shape () or " +
                                                           tuple_of(row_shape) + ", got " +
                                                           tuple_of(grad_loss.sizes()));
  Tensor rows = torch::stable::contiguous(torch::stable::to(grad_loss, acc_dtype));
  p.grad_loss = rows.const_data_ptr();
  p.grad_loss_stride = is_scalar ? 0 : 1;
  return rows;
}

const Tensor& Problem::check_scalar(const char* name, const Tensor& scalar) const {
  check_device(name, scalar);
  check(scalar.dim() == 0 && scalar.scalar_type() == ScalarType::Double,
        std::string(name) + " must be a float64 scalar, got shape " + tuple_of(scalar.sizes()));
  return scalar;
}

Rows::Rows(const Problem& problem, Params& p, bool statistics)
    : loss(problem.empty_rows()), max(problem.empty_rows()), log_sum(problem.empty_rows()) {
  check(!statistics || p.vocab_size < INT32_MAX,
        "logits must have less than 2^31 classes for statistics, got " +
            std::to_string(p.vocab_size));
  const auto set = [&](auto*& pointer, Tensor& rows, bool is_wanted, ScalarType dtype) {
    rows = is_wanted ? problem.empty_rows(dtype) : problem.no_rows(dtype);
    using Pointer = std::remove_reference_t<decltype(pointer)>;
    if (is_wanted) pointer = static_cast<Pointer>(rows.mutable_data_ptr());
  };
  p.row_loss = loss.mutable_data_ptr();
  p.row_max = max.mutable_data_ptr();
  p.log_sum = log_sum.mutable_data_ptr();
  const ScalarType acc = problem.acc_dtype;
  set(p.label_mass, label_mass, p.target_kind == TargetKind::probabilities, acc);
  set(p.loss_slope, loss_slope, p.focal_gamma != 0, acc);
  set(p.entropy, entropy, statistics, acc);
  set(p.argmax, argmax, statistics, ScalarType::Long);
  if (p.vocab_size > 0) return;
  for (Tensor* rows : {&loss, &max, &log_sum, &label_mass, &loss_slope, &entropy}) {
    torch::stable::zero_(*rows);
  }
  torch::stable::fill_(argmax, -1);
}

std::string Problem::position(int64_t row) const {
  std::vector<int64_t> index(row_shape.size());
  for (size_t d = row_shape.size(); d-- > 0; row /= row_shape[d]) index[d] = row % row_shape[d];
  return tuple_of(index);
}

}  // namespace fused_xent::binding
