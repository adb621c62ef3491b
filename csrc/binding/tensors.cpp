#include "tensors.h"

#include <algorithm>
#include <numeric>
#include <utility>

#if defined(__GLIBC__)
// std::shared_ptr counts without atomics while this variable of glibc 2.32 is true. With one of its
// own, the library loads under older versions; false is right for any number of threads.
char __libc_single_threaded = 0;
#endif

namespace fused_xent::binding {
namespace {

std::vector<int64_t> shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

bool has_shape(const Tensor& tensor, Sizes shape) {
  const auto sizes = tensor.sizes();
  return std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end());
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

// Sets the layout of a tensor to read from; of a contiguous copy where its rows cannot be merged.
Tensor with_layout(const Tensor& tensor, int64_t dim, Layout& layout) {
  if (merge_rows(tensor, dim, layout)) return tensor;
  Tensor copy = torch::stable::contiguous(tensor);
  merge_rows(copy, dim, layout);
  return copy;
}

TargetKind target_kind(ScalarType dtype) {
  switch (dtype) {
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

bool is_complex(ScalarType dtype) {
  return dtype == ScalarType::ComplexHalf || dtype == ScalarType::ComplexFloat ||
         dtype == ScalarType::ComplexDouble;
}

// The tensor itself where it is so already, without a call of torch.
Tensor contiguous_as(const Tensor& tensor, ScalarType dtype) {
  const Tensor cast = tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
  return cast.is_contiguous() ? cast : torch::stable::contiguous(cast);
}

// Memory for a gradient in which each row is as far from a multiple of 16 bytes as that row of the
// logits, so that kernels can access both by vectors. In empty_like(logits) it is not for
// logits[:, :50257] of 50304 classes, or logits[:, :-1] of sequences of 50257. Null if empty_like
// will do, and for rows so short that the padding would exceed 3 %. ../../fused_xent/_meta.py does
// the same for fake tensors.
OptionalTensor aligned_gradient(const Tensor& logits, int64_t dim) {
  const auto size = static_cast<int64_t>(logits.element_size());
  const int64_t vector = 16 / size, n_dims = logits.dim();
  if (logits.numel() == 0 || logits.stride(dim) != 1 || logits.size(dim) * size < 512) return {};
  std::vector<int64_t> outwards(n_dims), strides(n_dims);
  std::iota(outwards.rbegin(), outwards.rend(), 0);
  std::stable_sort(outwards.begin(), outwards.end(),
                   [&](int64_t a, int64_t b) { return logits.stride(a) < logits.stride(b); });
  const int64_t offset = logits.storage_offset() % vector;
  int64_t padding = 0, extent = 1, last = 0;
  for (const int64_t d : outwards) {
    const int64_t n = logits.size(d), stride = logits.stride(d);
    if (d != dim && n > 1 && stride < logits.size(dim)) return {};
    const int64_t pad = n > 1 ? ((stride - extent) % vector + vector) % vector : 0;
    padding += pad;
    strides[d] = extent + pad;
    last += (n - 1) * strides[d];
    extent = n * strides[d];
  }
  if (offset + padding == 0) return {};
  const Tensor memory = torch::stable::new_empty(logits, {offset + last + 1});
  AtenTensorHandle view;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(memory.get(), n_dims, logits.sizes().data(),
                                                        strides.data(), offset, &view));
  return Tensor(view);
}

}  // namespace

std::string tuple_of(Sizes values) {
  std::string text = "(";
  for (const int64_t value : values) text += std::to_string(value) + ", ";
  if (values.size() > 0) text.erase(text.size() - (values.size() == 1 ? 1 : 2));
  return text + ")";
}

DType dtype_of(const char* name, ScalarType dtype) {
  switch (dtype) {
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

Tensor empty_gradient(const Tensor& logits, int64_t dim, bool aligns_rows) {
  const OptionalTensor aligned = aligns_rows ? aligned_gradient(logits, dim) : std::nullopt;
  const Tensor gradient = aligned ? *aligned : torch::stable::empty_like(logits);
  Layout layout{};
  return merge_rows(gradient, dim, layout) ? gradient
                                           : torch::stable::new_empty(logits, logits.sizes());
}

void set_grad_logits(Params& params, const char* name, const Tensor& tensor, int64_t dim) {
  FUSED_XENT_CHECK(!overlaps_itself(tensor),
                   std::string(name) + " must have one memory location per element, got strides " +
                       tuple_of(tensor.strides()));
  FUSED_XENT_CHECK(merge_rows(tensor, dim, params.grad_layout),
                   std::string(name) +
                       " must have at most 4 row dimensions that cannot be merged, got shape " +
                       tuple_of(tensor.sizes()) + " with strides " + tuple_of(tensor.strides()));
  params.grad_logits = tensor.mutable_data_ptr();
}

Problem::Problem(const Inputs& inputs, const Options& options)
    : logits(inputs.logits),
      target(inputs.target),
      target_indices(inputs.target_indices),
      normalizer(inputs.normalizer),
      dim(inputs.dim),
      reduction(inputs.reduction) {
  static_cast<Options&>(params) = options;
  set_logits();
  if (target_indices) {
    set_sparse(options);
    set_labels();
  } else {
    set_target();
  }
  set_weights(inputs);
  FUSED_XENT_CHECK(reduction == kNone || reduction == kMean || reduction == kSum,
                   "reduction must be 0, 1 or 2, got " + std::to_string(reduction));
  if (!normalizer) return;
  check_device("normalizer", *normalizer);
  FUSED_XENT_CHECK(normalizer->dim() == 0 && normalizer->scalar_type() == ScalarType::Double,
                   "normalizer and total_weight must be float64 scalars, got shape " +
                       tuple_of(normalizer->sizes()));
}

Problem::Problem(const Tensor& logits_, int64_t dim_) : logits(logits_), dim(dim_) {
  set_logits();
  params.target_kind = TargetKind::probabilities;  // of which no row is left out, nor read
  params.target_layout = params.logits_layout;
}

Problem::Problem(const Tensor& logits_, const Tensor& classes, int64_t dim_, const Options& options)
    : logits(logits_), target_indices(classes), dim(dim_), reduction(kNone) {
  static_cast<Options&>(params) = options;
  set_logits();
  set_sparse(options);
}

void Problem::set_logits() {
  FUSED_XENT_CHECK(
      0 <= dim && dim < logits.dim(),
      "dim must be in [0, " + std::to_string(logits.dim()) + "), got " + std::to_string(dim));
  row_shape = shape_of(logits);
  params.dtype = dtype_of("logits", logits.scalar_type());
  acc_dtype = params.dtype == DType::float64 ? ScalarType::Double : ScalarType::Float;
  logits = with_layout(logits, dim, params.logits_layout);
  params.logits = logits.const_data_ptr();
  params.vocab_size = row_shape[dim];
  params.weight_sum = static_cast<double>(params.vocab_size);
  row_shape.erase(row_shape.begin() + dim);
  params.n_rows = 1;
  for (const int64_t size : row_shape) params.n_rows *= size;
}

void Problem::set_weights(const Inputs& inputs) {
  if (inputs.weight) {
    check_device("weight", *inputs.weight);
    dtype_of("weight", inputs.weight->scalar_type());
    FUSED_XENT_CHECK(has_shape(*inputs.weight, {params.vocab_size}),
                     "weight must have shape (" + std::to_string(params.vocab_size) + ",), got " +
                         tuple_of(inputs.weight->sizes()));
    weight = contiguous_as(*inputs.weight, acc_dtype);
    params.weight = weight->const_data_ptr();
  }
  token_weight = rows_of("token_weight", inputs.token_weight, params.token_weight);
}

void Problem::check_device(const char* name, const Tensor& tensor) const {
  FUSED_XENT_CHECK(tensor.device() == logits.device(),
                   std::string(name) + " must be on the logits' device, got another one");
}

void Problem::set_target() {
  check_device("target", *target);
  params.target_kind = target_kind(target->scalar_type());
  const bool is_indices = params.target_kind != TargetKind::probabilities;
  const auto shape = is_indices ? Sizes(row_shape) : logits.sizes();
  FUSED_XENT_CHECK(has_shape(*target, shape), "target must have shape " + tuple_of(shape) +
                                                  ", got " + tuple_of(target->sizes()));
  if (is_indices) {
    target = contiguous_as(*target, target->scalar_type());
  } else {
    params.target_dtype = dtype_of("target", target->scalar_type());
    const bool is_half = element_size(params.dtype) == 2;
    FUSED_XENT_CHECK(
        params.target_dtype == params.dtype || (is_half && params.target_dtype == DType::float32),
        "target must have the logits' dtype, or be float32 under 16-bit logits");
    target = with_layout(*target, dim, params.target_layout);
  }
  params.target = target->const_data_ptr();
}

// The kernels see class indices, which allocate_labels makes room for.
void Problem::set_sparse(const Options& options) {
  check_device("target_indices", *target_indices);
  sparse.classes_kind = target_kind(target_indices->scalar_type());
  FUSED_XENT_CHECK(
      sparse.classes_kind == TargetKind::int64 || sparse.classes_kind == TargetKind::int32,
      "target_indices must be int64 or int32");
  std::vector<int64_t> shape = row_shape;
  shape.insert(shape.begin() + dim, dim < target_indices->dim() ? target_indices->size(dim) : 0);
  FUSED_XENT_CHECK(has_shape(*target_indices, shape) && 1 <= shape[dim] && shape[dim] <= kMaxLabels,
                   "target_indices must have the logits' shape, with 1 to " +
                       std::to_string(kMaxLabels) + " classes in dimension " + std::to_string(dim) +
                       ", got shape " + tuple_of(target_indices->sizes()));
  sparse.n_labels = shape[dim];
  sparse.ignore_index = options.ignore_index;
  target_indices = with_layout(*target_indices, dim, sparse.classes_layout);
  sparse.classes = target_indices->const_data_ptr();
  params.target_kind = TargetKind::int32;
  params.ignore_index = INT64_MIN;  // no row is left out by its target
}

void Problem::set_labels() {
  check_device("target", *target);
  FUSED_XENT_CHECK(target_kind(target->scalar_type()) == TargetKind::probabilities &&
                       has_shape(*target, target_indices->sizes()),
                   "target must hold floating-point labels of target_indices' shape " +
                       tuple_of(target_indices->sizes()) + ", got shape " +
                       tuple_of(target->sizes()));
  dtype_of("target", target->scalar_type());
  if (target->scalar_type() != acc_dtype) target = torch::stable::to(*target, acc_dtype);
  target = with_layout(*target, dim, sparse.labels_layout);
  sparse.labels = target->const_data_ptr();
}

void Problem::allocate_labels(Params& p, bool keep_logits) {
  const auto allocate = [&](int64_t count, ScalarType dtype) {
    return of_labels_.emplace_back(empty({count}, dtype)).mutable_data_ptr();
  };
  p.target = sparse.target = static_cast<int32_t*>(allocate(p.n_rows, ScalarType::Int));
  if (sparse.labels == nullptr) return;
  p.label_weight = sparse.label_weight = allocate(p.n_rows, acc_dtype);
  if (sparse.n_labels == 1) return;
  p.extra_loss = sparse.extra_loss = allocate(p.n_rows, acc_dtype);
  if (keep_logits) sparse.logits = allocate(p.n_rows * sparse.n_labels, acc_dtype);
}

Tensor Problem::new_log_probs() {
  const Tensor log_probs = empty(target_indices->sizes(), acc_dtype);
  FUSED_XENT_CHECK(merge_rows(log_probs, dim, sparse.log_probs_layout),
                   "target_indices must have at most 4 row dimensions that cannot be merged");
  sparse.log_probs = log_probs.mutable_data_ptr();
  return log_probs;
}

Tensor empty_on(const Tensor& like, Sizes sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= std::max<int64_t>(sizes[d], 1)) {
    strides[d] = stride;
  }
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  const auto dtype_code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), dtype_code, device_type,
                                                  device_index, &handle));
  return Tensor(handle);
}

Tensor Problem::rows_of(const char* name, const Tensor& rows) const {
  check_device(name, rows);
  FUSED_XENT_CHECK(has_shape(rows, row_shape) && !is_complex(rows.scalar_type()),
                   std::string(name) + " must hold real numbers of shape " + tuple_of(row_shape) +
                       ", got shape " + tuple_of(rows.sizes()));
  return contiguous_as(rows, acc_dtype);
}

ScalarType Problem::loss_dtype(std::optional<ScalarType> given) const {
  const ScalarType dtype = given ? *given : logits.scalar_type();
  dtype_of("loss_dtype", dtype);
  return dtype;
}

Tensor Problem::set_grad_loss(Params& p, const OptionalTensor& grad_loss) const {
  Tensor rows = grad_loss ? *grad_loss : scalar(acc_dtype);
  if (!grad_loss) torch::stable::zero_(rows);
  check_device("grad_loss", rows);
  const bool is_scalar = rows.dim() == 0;
  FUSED_XENT_CHECK((is_scalar || has_shape(rows, row_shape)) && !is_complex(rows.scalar_type()),
                   "grad_loss must hold real numbers of shape () or " + tuple_of(row_shape) +
                       ", got shape " + tuple_of(rows.sizes()));
  rows = contiguous_as(rows, acc_dtype);
  p.grad_loss = rows.const_data_ptr();
  p.grad_loss_stride = is_scalar ? 0 : 1;
  return rows;
}

int64_t Problem::state_size() const {
  return 2 + (params.target_kind == TargetKind::probabilities) + (params.focal_gamma != 0);
}

void Problem::set_state(Params& p, const Tensor& state) const {
  check_device("state", state);
  std::vector<int64_t> shape = row_shape;
  shape.insert(shape.begin(), state_size());
  FUSED_XENT_CHECK(
      has_shape(state, shape) && state.scalar_type() == acc_dtype && state.is_contiguous(),
      "state must be contiguous, of the accumulation type and shape " + tuple_of(shape) +
          ", got shape " + tuple_of(state.sizes()));
  point_to_state(p, state.data_ptr());
}

void Problem::point_to_state(Params& p, void* state) const {
  char* next = static_cast<char*>(state);
  const auto take = [&] {
    return std::exchange(next, next + p.n_rows * (acc_dtype == ScalarType::Double ? 8 : 4));
  };
  p.row_max = take();
  p.log_sum = take();
  if (p.target_kind == TargetKind::probabilities) p.label_mass = take();
  if (p.focal_gamma != 0) p.loss_slope = take();
}

Rows::Rows(const Problem& problem, Params& p, bool statistics)
    : loss(problem.empty(problem.row_shape, problem.acc_dtype)) {
  FUSED_XENT_CHECK(!statistics || p.vocab_size < INT32_MAX,
                   "logits must have less than 2^31 classes for statistics, got " +
                       std::to_string(p.vocab_size));
  std::vector<int64_t> shape = problem.row_shape;
  shape.insert(shape.begin(), problem.state_size());
  state = problem.empty(shape, problem.acc_dtype);
  p.row_loss = loss.mutable_data_ptr();
  problem.point_to_state(p, state.mutable_data_ptr());
  if (statistics) {
    entropy = problem.empty(problem.row_shape, problem.acc_dtype);
    argmax = problem.empty(problem.row_shape, ScalarType::Long);
    p.entropy = entropy.mutable_data_ptr();
    p.argmax = static_cast<int64_t*>(argmax.mutable_data_ptr());
  }
  if (p.vocab_size > 0) return;
  torch::stable::zero_(loss);
  torch::stable::zero_(state);
  if (!statistics) return;
  torch::stable::zero_(entropy);
  torch::stable::fill_(argmax, -1);
}

Tensor Rows::lse() const {
  return torch::stable::subtract(torch::stable::select(state, 0, 0),
                                 torch::stable::select(state, 0, 1), -1);
}

std::vector<int64_t> Problem::index_of(int64_t row) const {
  std::vector<int64_t> index(row_shape.size());
  for (size_t d = row_shape.size(); d-- > 0; row /= row_shape[d]) index[d] = row % row_shape[d];
  return index;
}

std::string Problem::position(int64_t row) const { return tuple_of(index_of(row)); }

std::string Problem::position(int64_t row, int64_t label) const {
  std::vector<int64_t> index = index_of(row);
  index.insert(index.begin() + dim, label);
  return tuple_of(index);
}

}  // namespace fused_xent::binding
