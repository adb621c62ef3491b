#include "layout.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace fused_xent::binding {
namespace {

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

int32_t dtype_code(ScalarType dtype) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
}

Tensor empty_strided(Sizes sizes, Sizes strides, ScalarType dtype, int32_t device_type,
                     int32_t device_index) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), dtype_code(dtype), device_type,
                                                  device_index, &handle));
  return Tensor(handle);
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
  return empty_strided(sizes, strides, dtype, device_type, device_index);
}

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

Tensor with_layout(const Tensor& tensor, int64_t dim, Layout& layout) {
  if (merge_rows(tensor, dim, layout)) return tensor;
  Tensor copy = torch::stable::contiguous(tensor);
  merge_rows(copy, dim, layout);
  return copy;
}

Tensor contiguous_as(const Tensor& tensor, ScalarType dtype) {
  const Tensor cast = tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
  return cast.is_contiguous() ? cast : torch::stable::contiguous(cast);
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

}  // namespace fused_xent::binding
