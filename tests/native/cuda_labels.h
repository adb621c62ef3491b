// Compares the kernels of csrc/cuda/sparse_labels.cu with the same labels on all classes, by the
// definitions in long double: labels in every layout, repeated, padded and out of range.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "../../csrc/cuda/launch.h"
#include "checks.h"

namespace fused_xent::test {

class LabelCheck {
 public:
  LabelCheck(const Case& c, int64_t n_labels, TargetKind kind, Shape shape)
      : c_(c),
        problem_(c),
        labels_(problem_.acc, shape, c.n_rows, n_labels, c.misalignment),
        classes_(c.n_rows * n_labels),
        target_(4 * c.n_rows, 0),
        label_weight_(problem_.new_acc(c.n_rows)),
        extra_loss_(problem_.new_acc(c.n_rows)),
        token_weight_(problem_.new_acc(c.n_rows)),
        kept_(problem_.new_acc(c.n_rows * n_labels)) {
    sparse_.n_labels = n_labels;
    sparse_.classes_kind = kind;
    sparse_.ignore_index = kIgnored;
    choose_labels();
    fill_classes(shape);
    static_cast<Params&>(a_) = problem_.params;
    a_.target_kind = TargetKind::int32;
    a_.ignore_index = INT64_MIN;
    a_.target = sparse_.target = static_cast<int32_t*>(target_.data());
    a_.weight_sum_on_device = c.labels.has_weight ? &problem_.params.weight_sum : nullptr;
  }

  void run() {
    const Reference reference(problem_);
    sparse_.labels = labels_.memory.data();
    sparse_.labels_layout = labels_.layout;
    a_.label_weight = sparse_.label_weight = label_weight_.data();
    a_.extra_loss = sparse_.extra_loss = extra_loss_.data();
    sparse_.logits = kept_.data();
    require(cuda::read_labels(a_, sparse_, nullptr), "read_labels");
    for (int64_t row = 0; row < c_.n_rows; ++row) check_sums(row);
    Rows rows(problem_, a_);
    fill_state(reference);
    Tensor gradient(c_.dtype, c_.gradient, c_.n_rows, c_.vocab_size, c_.misalignment);
    write_to(a_, gradient);
    require(cuda::write_label_gradients(a_, sparse_, nullptr), "write_label_gradients");
    check_gradients(reference, gradient);
    select(reference);
    for (const Memory* memory : {&target_, &label_weight_, &extra_loss_, &token_weight_, &kept_}) {
      check(memory->guards_are_intact(), c_, "a kernel of labels wrote beyond its results");
    }
  }

 private:
  static constexpr int64_t kIgnored = -100;

  int64_t& class_of(int64_t row, int64_t k) { return classes_[row * sparse_.n_labels + k]; }
  bool is_bad(int64_t row) {
    for (int64_t k = 0; k < sparse_.n_labels; ++k) {
      const int64_t y = class_of(row, k);
      if (y != kIgnored && (y < 0 || y >= c_.vocab_size)) return !problem_.is_ignored(row);
    }
    return false;
  }

  void require(cudaError_t error, const char* what) const {
    check(error == cudaSuccess, c_, std::string(what) + ": " + cudaGetErrorString(error));
  }

  // Multiples of 1/64, which add up without rounding; those out of range are on no class. Half of
  // the rows have few classes, on which many labels are.
  void choose_labels() {
    for (int64_t row = 0; row < c_.n_rows; ++row) {
      for (int64_t j = 0; j < c_.vocab_size; ++j) problem_.target.set(row, j, 0);
      const int64_t n_classes =
          row % 2 == 0 ? c_.vocab_size : std::min<int64_t>(c_.vocab_size, 1 + sparse_.n_labels / 3);
      const int64_t bad[] = {c_.vocab_size, -1,
                             sparse_.classes_kind == TargetKind::int64 ? 1LL << 32 : -2};
      for (int64_t k = 0; k < sparse_.n_labels; ++k) {
        int64_t y = (random_.below(n_classes) + row) % c_.vocab_size;
        if (row % 7 == 2 || random_.below(6) == 0) y = kIgnored;
        const bool is_last = k == sparse_.n_labels - 1;
        if (problem_.is_ignored(row) || (row % 7 == 5 && is_last)) y = bad[row % 3];
        const double label = static_cast<double>(random_.below(17)) / 64;
        class_of(row, k) = y;
        labels_.set(row, k, y == kIgnored ? NAN : label);
        if (0 <= y && y < c_.vocab_size)
          problem_.target.set(row, y, problem_.target.at(row, y) + label);
      }
    }
  }

  void fill_classes(Shape shape) {
    const int64_t size = sparse_.classes_kind == TargetKind::int64 ? 8 : 4;
    sparse_.classes_layout = layout_of(shape, c_.n_rows, sparse_.n_labels);
    memory_ = Memory(extent(sparse_.classes_layout, sparse_.n_labels) * size, 0);
    for (int64_t row = 0; row < c_.n_rows; ++row) {
      for (int64_t k = 0; k < sparse_.n_labels; ++k) {
        const int64_t at = row_offset(sparse_.classes_layout, row);
        std::memcpy(static_cast<char*>(memory_.data()) +
                        (at + k * sparse_.classes_layout.class_stride) * size,
                    &class_of(row, k), size);  // assumes little-endian
      }
    }
    sparse_.classes = memory_.data();
  }

  Real logit(int64_t row, int64_t k) {
    const Real x = static_cast<Real>(problem_.logits.at(row, class_of(row, k))) * a_.logit_scale;
    return a_.softcap == 0 ? x : a_.softcap * std::tanh(x / a_.softcap);
  }

  // The target, its weight and the extra loss.
  void check_sums(int64_t row) {
    const int64_t target = sparse_.target[row];
    if (is_bad(row)) return check(target == -1, c_, "the target of a label out of range");
    Real weight = 0, extra_loss = 0, top = -INFINITY;
    const bool is_read = !problem_.is_ignored(row);
    int64_t is_label = 0;
    for (int64_t k = 0; is_read && k < sparse_.n_labels; ++k) {
      if (class_of(row, k) == kIgnored) continue;
      top = std::max(top, logit(row, k));
      is_label += class_of(row, k) == target;
    }
    for (int64_t k = 0; is_read && k < sparse_.n_labels; ++k) {
      if (class_of(row, k) == kIgnored) continue;
      const Real w = problem_.class_weight(class_of(row, k)) * labels_.at(row, k);
      weight += w;
      if (w != 0) extra_loss += w * (top - logit(row, k));
    }
    check(is_label > 0 || (std::isinf(top) && target == 0), c_, "the target is no label");
    extra_loss *= 1 - a_.label_smoothing;
    near(label_weight_, row, weight, 1 + std::fabs(weight), "label_weight");
    near(extra_loss_, row, extra_loss, 1 + std::fabs(weight) * 30, "extra_loss");
  }

  void near(const Memory& actual, int64_t i, Real exact, Real terms, const char* what) const {
    const double allowed = 16 * unit_roundoff(problem_.acc) * static_cast<double>(terms);
    check_near(problem_.acc_at(actual, i), {static_cast<double>(exact), allowed, 1}, c_, what, i,
               -1);
  }

  // As if the kernels for class indices had run.
  void fill_state(const Reference& reference) {
    for (int64_t row = 0; row < c_.n_rows; ++row) {
      if (problem_.is_ignored(row)) continue;
      const DType acc = problem_.acc;
      write(acc, a_.row_max, row, static_cast<double>(reference.max[row]));
      write(acc, a_.log_sum, row, static_cast<double>(reference.log_sum[row]));
      if (a_.loss_slope != nullptr) write(acc, a_.loss_slope, row, reference.loss_slope[row].value);
      if (a_.entropy != nullptr) write(acc, a_.entropy, row, reference.entropy[row].value);
    }
  }

  // At the labels; other elements are still NaN.
  void check_gradients(const Reference& reference, const Tensor& gradient) {
    check(gradient.gaps_are_intact(), c_, "write_label_gradients wrote outside of its elements");
    for (int64_t row = 0; row < c_.n_rows; ++row) {
      std::vector<bool> has_label(c_.vocab_size);
      for (int64_t k = 0; k < sparse_.n_labels && !is_bad(row) && !problem_.is_ignored(row); ++k) {
        if (class_of(row, k) != kIgnored) has_label[class_of(row, k)] = true;
      }
      for (int64_t j = 0; j < c_.vocab_size; ++j) {
        Expected expected = reference.gradient[row * c_.vocab_size + j];
        if (!has_label[j]) expected = {NAN, 0, 0};
        check_near(gradient.at(row, j), expected, c_, "write_label_gradients", row, j);
      }
    }
  }

  // Selected classes have no labels; their rows' token weights follow from them.
  void select(const Reference& reference) {
    SparseLabels selected = sparse_;
    Tensor log_probs(problem_.acc, c_.target, c_.n_rows, sparse_.n_labels, c_.misalignment);
    selected.labels = nullptr;
    selected.logits = selected.label_weight = selected.extra_loss = nullptr;
    selected.token_weight = token_weight_.data();
    selected.log_probs = log_probs.memory.data();
    selected.log_probs_layout = log_probs.layout;
    cuda::Arguments a = a_;
    a.token_weight = nullptr;
    require(cuda::read_labels(a, selected, nullptr), "read_labels of selected classes");
    require(cuda::write_log_probs(a, selected, nullptr), "write_log_probs");
    check(log_probs.gaps_are_intact(), c_, "write_log_probs wrote outside of its elements");
    for (int64_t row = 0; row < c_.n_rows; ++row) {
      if (problem_.is_ignored(row)) continue;
      bool counts = is_bad(row);
      for (int64_t k = 0; k < sparse_.n_labels; ++k) {
        const bool is_padding = class_of(row, k) == kIgnored;
        counts |= !is_padding;
        Expected expected{is_bad(row) ? NAN : 0, 0, 0};
        if (!is_bad(row) && !is_padding) {
          const Real log_prob = logit(row, k) - reference.exact_lse[row];
          const double size = 1 + static_cast<double>(std::fabs(log_prob));
          const double terms = size + static_cast<double>(std::fabs(reference.max[row]));
          expected = {static_cast<double>(log_prob), 16 * unit_roundoff(problem_.acc) * terms, 0};
        }
        check_near(log_probs.at(row, k), expected, c_, "log_probs", row, k);
      }
      check(problem_.acc_at(token_weight_, row) == counts, c_, "token_weight of selected classes");
    }
  }

  const Case c_;
  Problem problem_;
  Tensor labels_;
  std::vector<int64_t> classes_;
  Memory memory_, target_, label_weight_, extra_loss_, token_weight_, kept_;
  SparseLabels sparse_{};
  cuda::Arguments a_{};
  Random random_;
};

// A thread has the labels of a row up to 8, a warp more; a batch of a warp are 128.
inline void check_labels(bool small, bool bfloat16_only) {
  const Labels kinds[] = {
      {"sparse labels", TargetKind::probabilities, true, false, 0, Ignored::none},
      {"weighted smoothed sparse labels", TargetKind::probabilities, true, true, 0.2,
       Ignored::none}};
  std::vector<int64_t> counts{1, 2, 3, 8, 9, 33, 64, 150};
  if (small) counts = {3, 40};
  Random random;
  std::vector<CaseOptions> all_options{CaseOptions{}};
  all_options.insert(all_options.end(), std::begin(kCaseOptions), std::end(kCaseOptions));
  for (const DType dtype : kDTypes) {
    if (bfloat16_only && dtype != DType::bfloat16) continue;
    for (Labels labels : kinds) {
      labels.is_float32 = element_size(dtype) == 2;
      for (const CaseOptions& options : all_options) {
        for (const int64_t n_labels : counts) {
          const auto shape = [&] { return static_cast<Shape>(random.below(kShapes)); };
          Case c{dtype, labels, small ? 14 : 24 + random.below(60),
                 1 + random.below(small ? 40 : 90)};
          c.options = options;
          c.logits = shape();
          c.gradient = shape();
          c.target = shape();
          c.misalignment = random.below(3);
          c.scalar_upstream = random.below(2) == 0;
          const auto kind = random.below(2) == 0 ? TargetKind::int64 : TargetKind::int32;
          LabelCheck(c, n_labels, kind, shape()).run();
        }
      }
    }
  }
}

}  // namespace fused_xent::test
