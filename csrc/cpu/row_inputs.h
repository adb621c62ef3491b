// Where the rows of a call are, their targets and their upstream gradients, on the CPU.
#pragma once

#include "../xent_rows.h"

namespace fused_xent::cpu {

template <typename T>
XENT_INLINE const T* logits_row(const Params& p, int64_t row) {
  return static_cast<const T*>(p.logits) + row_offset(p.logits_layout, row);
}

template <typename T>
XENT_INLINE T* gradient_row(const Params& p, int64_t row) {
  return static_cast<T*>(p.grad_logits) + row_offset(p.grad_layout, row);
}

// True for rows that are ignored or have token weight 0: their logits are not read, their target is
// not checked, and their loss and gradient are 0.
XENT_INLINE bool is_left_out(const Params& p, int64_t row) {
  return (has_indices(p) && target_index(p, row) == p.ignore_index) || token_weight(p, row) == 0;
}

// An index that kernels may address by: -1 in place of one that is no class. Targets have been
// checked before, but another thread may write to them at the same time.
XENT_INLINE int64_t checked_class(const Params& p, int64_t index) {
  return static_cast<uint64_t>(index) < static_cast<uint64_t>(p.vocab_size) ? index : -1;
}

// The class that row kernels keep out of a row's sums, see finish_batch; -1: none.
XENT_INLINE int64_t class_apart(const Params& p, int64_t row) {
  return has_spread(p) ? -1 : checked_class(p, target_index(p, row));
}

// True if a row's loss is more than its cross-entropy, or its gradient more than that of its loss.
XENT_INLINE bool has_row_options(const Params& p) {
  return p.token_weight != nullptr || p.lse_square_scale != 0 || p.focal_gamma != 0 ||
         p.grad_lse != nullptr || p.grad_entropy != nullptr;
}

XENT_INLINE double grad_loss_of(const Params& p, int64_t row) {
  return acc_at(p, p.grad_loss, row * p.grad_loss_stride) * p.grad_scale;
}

}  // namespace fused_xent::cpu
