// From torch's tensors to the kernels' Params, with every check that keeps a kernel inside memory.
// What a user can get wrong is checked, and said better, in fused_xent/functional.py.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "../xent_params.h"

namespace fused_xent::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };  // torch.nn._reduction

using OptionalTensor = std::optional<Tensor>;
// Of the schemas: label_smoothing, lse_square_scale, focal_gamma, softcap, logit_scale.
using Numbers = std::vector<double>;

// The arguments that all operators share, checked against each other. Holds the tensors alive.
struct Problem {
  Params params{};
  Tensor logits, target;
  OptionalTensor weight, token_weight;
  std::vector<int64_t> row_shape;  // the logits' without dim: the shape of the unreduced loss
  ScalarType acc_dtype;

  Problem(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
          const OptionalTensor& token_weight, int64_t dim, int64_t ignore_index,
          const Numbers& numbers);

  void check_device(const char* name, const Tensor& tensor) const;
  Tensor empty_rows() const { return empty_rows(acc_dtype); }
  Tensor empty_rows(ScalarType dtype) const;
  Tensor no_rows(ScalarType dtype) const;  // what stands for a result that is not wanted
  // A per-row tensor that a caller passes: acc, contiguous, row_shape.
  const Tensor& check_rows(const char* name, const Tensor& rows) const;
  // A scalar of float64 that a caller passes.
  const Tensor& check_scalar(const char* name, const Tensor& scalar) const;
  // Sets p.grad_loss; the result owns its memory.
  Tensor set_grad_loss(Params& p, const Tensor& grad_loss) const;
  // "(3, 1)" for row 7 of a (4, 2) loss.
  std::string position(int64_t row) const;

 private:
  void set_target(int64_t dim);
};

// Per-row tensors that forward writes, and p points to; without elements where they are not wanted.
// Rows of no classes have loss 0.
struct Rows {
  Tensor loss, max, log_sum, label_mass, loss_slope, entropy, argmax;

  Rows(const Problem& problem, Params& p, bool statistics);
};

// Throws std::invalid_argument, Python's ValueError: "<argument> must be <rule>, got <value>".
void check(bool condition, const std::string& message);

DType dtype_of(const char* name, const Tensor& tensor);
// At most kMaxRowDims row dimensions that cannot be merged; see with_layout.
Layout layout_of(const char* name, const Tensor& tensor, int64_t dim);
// The tensor, or a contiguous copy where layout_of would refuse it.
Tensor with_layout(const Tensor& tensor, int64_t dim);
// Unwritten memory for the logits' gradient, laid out as they are where possible.
Tensor empty_gradient(const Tensor& logits, int64_t dim);
void check_reduction(int64_t reduction, torch::headeronly::ScalarType loss_dtype);
// Sets params.grad_logits: a tensor to write to, each of whose elements has memory of its own.
void set_grad_logits(Params& params, const char* name, const Tensor& tensor, int64_t dim);

}  // namespace fused_xent::binding
