// Sparse labels of a problem: the same labels as its dense probabilities.
#pragma once

#include "checks.h"

namespace fused_xent::test {

// What read_labels and write_label_gradients take, and the memory that they write to. Without
// sparse labels nothing happens.
class Sparse {
 public:
  // Points p to the targets that read_labels writes.
  Sparse(const Problem& problem, Params& p) : labels_(problem.sparse) {
    if (labels_.n_labels == 0) return;
    target_ = Memory(4 * p.n_rows, 0);
    label_weight_ = problem.new_acc(p.n_rows);
    extra_loss_ = problem.new_acc(p.n_rows);
    logits_ = problem.new_acc(p.n_rows * labels_.n_labels);
    p.target_kind = TargetKind::int32;
    p.ignore_index = INT64_MIN;
    p.target = labels_.target = static_cast<int32_t*>(target_.data());
    p.label_weight = labels_.label_weight = label_weight_.data();
    p.extra_loss = labels_.extra_loss = extra_loss_.data();
    labels_.logits = logits_.data();
  }

  void read(const Params& p, const cpu::Threads& threads) const {
    if (labels_.n_labels > 0) cpu::read_labels(p, labels_, threads);
  }
  void write_gradients(const Params& p, const cpu::Threads& threads) const {
    if (labels_.n_labels > 0) cpu::write_label_gradients(p, labels_, threads);
  }
  bool guards_are_intact() const {
    for (const Memory* memory : {&target_, &label_weight_, &extra_loss_, &logits_}) {
      if (*memory != Memory() && !memory->guards_are_intact()) return false;
    }
    return true;
  }

 private:
  SparseLabels labels_;
  Memory target_, label_weight_, extra_loss_, logits_;
};

// Selects the classes of a problem's labels, and checks their log-probabilities.
inline void check_log_probs(const Problem& problem, const Reference& reference,
                            const cpu::Threads& threads) {
  const Case& c = problem.c;
  SparseLabels sparse = problem.sparse;
  Params p = problem.params;
  sparse.labels = nullptr;
  Memory target(4 * p.n_rows, 0), kept = problem.new_acc(p.n_rows);
  Memory log_probs = problem.new_acc(p.n_rows * sparse.n_labels);
  p.target_kind = TargetKind::int32;
  p.ignore_index = INT64_MIN;
  p.weight = nullptr;
  p.label_smoothing = p.lse_square_scale = p.focal_gamma = 0;
  p.target = sparse.target = static_cast<int32_t*>(target.data());
  sparse.token_weight = kept.data();
  sparse.log_probs = log_probs.data();
  sparse.log_probs_layout = sparse.classes_layout;
  p.token_weight = nullptr;
  cpu::read_labels(p, sparse, threads);
  p.token_weight = kept.data();
  const Rows rows(problem, p);
  cpu::forward(p, threads);
  cpu::write_log_probs(p, sparse, threads);
  check(log_probs.guards_are_intact(), c, "write_log_probs wrote outside of its elements");
  for (int64_t row = 0; row < c.n_rows; ++row) {
    for (int64_t k = 0; k < sparse.n_labels; ++k) {
      const int64_t y = problem.class_of_label(row, k);
      Expected expected;
      if (y != sparse.ignore_index) {
        const Real log_prob = reference.logit(row, y) - reference.exact_lse[row];
        expected = {static_cast<double>(log_prob), 2 * reference.lse[row].allowed, 1};
      }
      const int64_t at = row_offset(sparse.classes_layout, row);
      const double found = problem.acc_at(log_probs, at + k * sparse.classes_layout.class_stride);
      check_near(found, expected, c, "log-probability", row, k);
    }
  }
}

}  // namespace fused_xent::test
