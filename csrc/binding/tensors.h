// From torch's tensors to the kernels' Params, with every check that keeps a kernel inside memory.
// fused_xent/_problem.py checks what a user can get wrong first, and names the user's argument.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "layout.h"

namespace fused_xent::binding {

enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };  // torch.nn._reduction

// What the operators of a loss take besides options, in the order of their schemas.
struct Inputs {
  Tensor logits, target;
  OptionalTensor weight, token_weight;
  OptionalTensor normalizer;  // the mean's divisor; null: the sum of the rows' weights
  int64_t dim, reduction;
  OptionalTensor target_indices;  // the classes of sparse labels, which are `target`
};

// The inputs, checked against each other, and the Params made of them. Owns the tensors.
struct Problem {
  Params params{};
  SparseLabels sparse{};
  Tensor logits;
  OptionalTensor target, target_indices, weight, token_weight, normalizer;
  int64_t dim, reduction = kSum;
  std::vector<int64_t> row_shape;  // the logits' without dim: the shape of the unreduced loss
  ScalarType acc_dtype;

  Problem(const Inputs& inputs, const Options& options);
  // A gradient that is only multiplied: no row is left out.
  Problem(const Tensor& logits, int64_t dim);
  // Logits of which some classes are selected.
  Problem(const Tensor& logits, const Tensor& classes, int64_t dim, const Options& options);

  // Unwritten memory on the logits' device.
  Tensor empty(Sizes sizes, ScalarType dtype) const { return empty_on(logits, sizes, dtype); }
  Tensor scalar(ScalarType dtype) const { return empty({}, dtype); }
  // Checks a per-row tensor that a caller passes. Returns it contiguous, in the accumulation type.
  Tensor rows_of(const char* name, const Tensor& rows) const;
  // The same, if there is one; `pointer` is set to it.
  template <typename Pointer>
  OptionalTensor rows_of(const char* name, const OptionalTensor& rows, Pointer& pointer) const {
    if (!rows) return {};
    OptionalTensor found = rows_of(name, *rows);
    pointer = found->data_ptr();
    return found;
  }
  // The loss's dtype: by default the logits'.
  ScalarType loss_dtype(std::optional<ScalarType> given) const;
  // Sets p.grad_loss, to 0 without one; the result owns its memory.
  Tensor set_grad_loss(Params& p, const OptionalTensor& grad_loss) const;
  // Checks the state that forward returned, and points p's pointers to it.
  void set_state(Params& p, const Tensor& state) const;
  // How many per-row values the state has: row_max, log_sum, for probabilities label_mass, and for
  // the focal loss loss_slope.
  int64_t state_size() const;
  // Points p's pointers to these rows of the state.
  void point_to_state(Params& p, void* state) const;
  // "(3, 1)" for row 7 of a (4, 2) loss.
  std::string position(int64_t row) const;
  // The same with the label's number in the place of the classes.
  std::string position(int64_t row, int64_t label) const;
  // Throws where a class does not fit into 32 bits, which `purpose` needs.
  void check_32_bits_for(const char* purpose) const;
  // Allocates what read_labels writes, and points p's pointers to it. keep_logits: for gradients.
  void allocate_labels(Params& p, bool keep_logits);
  // Memory for the log-probabilities of selected classes, to which `sparse` points.
  Tensor new_log_probs();

 private:
  void set_logits();
  void set_weights(const Inputs& inputs);
  void set_target();
  void set_sparse(const Options& options);
  void set_labels();
  void check_device(const char* name, const Tensor& tensor) const;
  std::vector<int64_t> index_of(int64_t row) const;

  std::vector<Tensor> of_labels_;
};

// Per-row tensors that forward writes, and p points to. Rows of no classes have loss 0.
struct Rows {
  Tensor loss;
  Tensor state;            // (k, *row_shape), what backward reads: see Problem::set_state
  Tensor entropy, argmax;  // with statistics

  Rows(const Problem& problem, Params& p, bool statistics);
  Tensor lse() const;
};

DType dtype_of(const char* name, ScalarType dtype);

}  // namespace fused_xent::binding
