// Forward and backward of one row by the row kernels: everything but the loops over its classes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "tasks.h"

namespace fused_xent::cpu {

inline int64_t target_or_none(const Params& p, int64_t row) {
  return has_indices(p) ? target_index(p, row) : -1;
}

inline RowLabels<double> labels_of_row(const Params& p, int64_t row) {
  return labels_of(p, smoothing_of(p), target_or_none(p, row));
}

// 0 for probabilities, which have no single target.
inline Transformed target_logit(const Params& p, const Kernels& k, int64_t row) {
  return has_indices(p) ? k.logit(p, row, target_index(p, row)) : Transformed{0, 1};
}

// See kMaxOrigin.
inline bool is_for_tiles(const Params& p, double max) {
  return !is_general(p) && !(std::fabs(max) < kMaxOrigin);
}

// Adds class_apart to the statistics of the other classes, and returns log(s).
inline double add_target(const Params& p, int64_t row, double target_logit,
                         FullStats<double>& stats) {
  const int64_t apart = class_apart(p, row);
  return apart < 0 ? log_sum_of(stats) : add_class(stats, target_logit, apart);
}

inline void finish_row(const Params& p, int64_t row, const FullStats<double>& stats, double log_sum,
                       double target_logit) {
  // The transformed target may be rounded differently than in the loop over all classes.
  const double logit = std::min(target_logit, stats.max);
  const RowLabels<double> labels = labels_of_row(p, row);
  RowResults<double> results = plain_results<double>(p, labels, logit, stats, log_sum);
  results.entropy = entropy_of(stats, log_sum);
  if (has_row_options(p)) {
    apply_options(p, row, labels, has_indices(p) ? p.weight_sum : results.mass, results);
  }
  write_results(p, row, results, stats.argmax);
}

// stats: of all classes but class_apart, which is added.
inline void finish_row_or_tile(const Params& p, const Kernels& k, int64_t row,
                               FullStats<double>& stats) {
  const double target = target_logit(p, k, row).logit;
  const double log_sum = add_target(p, row, target, stats);
  if (is_for_tiles(p, stats.max)) return k.tile_forward(p, row, row + 1);
  finish_row(p, row, stats, log_sum, target);
}

inline void forward_row(const Params& p, const Kernels& k, int64_t row) {
  if (is_left_out(p, row)) return write_unread_row(p, row, 0.0);
  auto stats = k.segment_stats(p, row, 0, std::min(kSegmentClasses, p.vocab_size));
  for (int64_t j = kSegmentClasses; j < p.vocab_size; j += kSegmentClasses) {
    merge_stats(stats, k.segment_stats(p, row, j, std::min(j + kSegmentClasses, p.vocab_size)));
  }
  finish_row_or_tile(p, k, row, stats);
}

// What the gradients of all segments of a row have in common.
struct RowBackward {
  FullGradient<double> gradient{};
  double at_target = 0;

  RowBackward() = default;
  RowBackward(const Params& p, int64_t row, const Transformed& target) {
    const RowResults<double> results = saved_results<double>(p, row);
    const Upstream<double> upstream = upstream_of(p, row, results);
    const RowLabels<double> labels = labels_of_row(p, row);
    const double mass = has_indices(p) ? p.weight_sum : results.mass;
    gradient = gradient_of_row(upstream, labels, mass, results);
    at_target = gradient_at_target(upstream, labels, mass, results, target.logit) * target.slope;
  }

  // The gradient of classes [begin, end).
  void write(const Params& p, const Kernels& k, int64_t row, int64_t begin, int64_t end) const {
    k.segment_gradient(p, row, begin, end, gradient);
    write_target(p, k, row, begin, end);
  }

  void write_target(const Params& p, const Kernels& k, int64_t row, int64_t begin,
                    int64_t end) const {
    const int64_t y = target_or_none(p, row);
    if (begin <= y && y < end) k.set_gradient(p, row, y, at_target);
  }
};

inline void zero_gradient(const Params& p, int64_t row, int64_t begin, int64_t end) {
  const int64_t size = element_size(p.dtype);
  char* out = static_cast<char*>(p.grad_logits) + row_offset(p.grad_layout, row) * size;
  std::memset(out + begin * size, 0, (end - begin) * size);
}

inline void backward_row(const Params& p, const Kernels& k, int64_t row) {
  if (is_left_out(p, row)) return zero_gradient(p, row, 0, p.vocab_size);
  if (is_for_tiles(p, acc_at(p, p.row_max, row))) return k.tile_backward(p, row, row + 1);
  RowBackward(p, row, target_logit(p, k, row)).write(p, k, row, 0, p.vocab_size);
}

// The memory of a RowScratch, kept by each thread from row to row.
struct ScratchMemory {
  std::vector<float> exponentials;
  std::vector<double> origins;

  RowScratch for_row(const Params& p) {
    if (element_size(p.dtype) == 2) exponentials.resize(p.vocab_size);
    origins.resize(ceil_div(p.vocab_size, kBlock));
    return {exponentials.data(), origins.data()};
  }
};

inline void forward_backward_row(const Params& p, const Kernels& k, int64_t row,
                                 const RowScratch& scratch) {
  if (is_left_out(p, row)) {
    write_unread_row(p, row, 0.0);
    return zero_gradient(p, row, 0, p.vocab_size);
  }
  const Transformed target = target_logit(p, k, row);  // before it is overwritten
  FullStats<double> stats = k.row_stats_saving(p, row, scratch);
  const double log_sum = add_target(p, row, target.logit, stats);
  // 16-bit logits have not been overwritten yet.
  if (is_for_tiles(p, stats.max) && element_size(p.dtype) == 2) {
    k.tile_forward(p, row, row + 1);
    return k.tile_backward(p, row, row + 1);
  }
  finish_row(p, row, stats, log_sum, target.logit);
  const RowBackward backward(p, row, target);
  k.row_gradient_of_saved(p, row, scratch, backward.gradient);
  backward.write_target(p, k, row, 0, p.vocab_size);
}

}  // namespace fused_xent::cpu
