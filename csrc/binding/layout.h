// How tensors lie in memory: the layouts that kernels read and write by, and new memory.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../xent_params.h"

namespace fused_xent::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// Throws Python's ValueError: "<argument> must be <rule>, got <value>". The message is built only
// where the condition does not hold.
#define FUSED_XENT_CHECK(condition, message) \
  ((condition) ? void() : throw std::invalid_argument(message))

std::string tuple_of(Sizes values);
int32_t dtype_code(ScalarType dtype);  // as torch's C functions take it

// Unwritten memory: any, and contiguous on the device of `like`.
Tensor empty_strided(Sizes sizes, Sizes strides, ScalarType dtype, int32_t device_type,
                     int32_t device_index);
Tensor empty_on(const Tensor& like, Sizes sizes, ScalarType dtype);

// Sets the layout of a tensor whose classes are along dim. Returns false if more than kMaxRowDims
// row dimensions remain.
bool merge_rows(const Tensor& tensor, int64_t dim, Layout& layout);
// The same for a tensor to read from. Returns it, or a contiguous copy if its rows cannot be
// merged.
Tensor with_layout(const Tensor& tensor, int64_t dim, Layout& layout);
// Returns the tensor itself, without a call of torch, if it is contiguous and of the dtype already.
Tensor contiguous_as(const Tensor& tensor, ScalarType dtype);

// Unwritten memory for the logits' gradient, laid out as they are where possible. aligns_rows: the
// same vectors of 16 bytes are aligned in the rows of both.
Tensor empty_gradient(const Tensor& logits, int64_t dim, bool aligns_rows);
// Sets params.grad_logits: a tensor to write to, each of whose elements has memory of its own.
void set_grad_logits(Params& params, const char* name, const Tensor& tensor, int64_t dim);

}  // namespace fused_xent::binding
