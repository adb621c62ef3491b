// Loss and gradient of one row by the row kernels: all but the loops over its classes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "tasks.h"

namespace fused_xent::cpu {

inline double spread_of(const Params& p) {
  return has_indices(p) ? p.label_smoothing / static_cast<double>(p.vocab_size) : 1.0;
}

// The row kernels where a class costs no more than the softmax.
struct PlainRow {
  using Stats = RowStats<double>;

  // 0 for probabilities, which have no one target.
  static Transformed target_logit(const Params& p, const Kernels& k, int64_t row) {
    return {has_indices(p) ? k.logit(p, row, target_index(p, row)) : 0, 1};
  }
  static Stats stats(const Params& p, const Kernels& k, int64_t row, int64_t begin, int64_t end) {
    return k.segment_stats(p, row, begin, end);
  }
  static void write_gradient(const Params& p, const Kernels& k, int64_t row, int64_t begin,
                             int64_t end, const RowGradient& gradient) {
    k.segment_gradient(p, row, begin, end, gradient);
  }
  static void finish(const Params&, int64_t, const Stats&, double) {}
  // See kMaxOrigin.
  static bool is_for_tiles(double max) { return !(std::fabs(max) < kMaxOrigin); }
};

// The others.
struct GeneralRow {
  using Stats = FullStats<double>;

  static Transformed target_logit(const Params& p, const Kernels& k, int64_t row) {
    return has_indices(p) ? k.transformed_logit(p, row, target_index(p, row)) : Transformed{0, 1};
  }
  static Stats stats(const Params& p, const Kernels& k, int64_t row, int64_t begin, int64_t end) {
    return k.general_stats(p, row, begin, end);
  }
  static void write_gradient(const Params& p, const Kernels& k, int64_t row, int64_t begin,
                             int64_t end, const RowGradient& gradient) {
    k.general_gradient(p, row, begin, end, gradient);
  }
  static void finish(const Params& p, int64_t row, const Stats& stats, double log_sum) {
    if (p.entropy != nullptr) set_acc(p, p.entropy, row, log_sum - stats.moment / stats.sum);
    if (p.argmax != nullptr) p.argmax[row] = stats.argmax;
  }
  static bool is_for_tiles(double) { return false; }
};

// The maximum's own term is 1, and may come out a little below.
inline double log_sum_of(const RowStats<double>& stats) {
  return 0 < stats.sum && stats.sum < 1 ? 0 : std::log(stats.sum);
}

inline double on_target_of(const Params& p, int64_t row) {
  return (1 - p.label_smoothing) * class_weight(p, target_index(p, row));
}

// All but what options make of it: see finish_rows.
inline void finish_forward(const Params& p, int64_t row, double log_sum, double target_logit,
                           const RowStats<double>& stats) {
  double loss;
  if (has_indices(p)) {
    const double shifted_target = target_logit - stats.max;
    loss = index_loss(on_target_of(p, row), spread_of(p), shifted_target, log_sum, stats.mass,
                      stats.dot);
  } else {
    loss = probability_loss(log_sum, stats.mass, stats.dot);
    set_acc(p, p.label_mass, row, stats.mass);
  }
  set_acc(p, p.row_loss, row, loss);
  set_acc(p, p.row_max, row, stats.max);
  set_acc(p, p.log_sum, row, log_sum);
}

inline void finish_left_out(const Params& p, int64_t row) {
  for (void* values : {p.row_loss, p.row_max, p.log_sum}) set_acc(p, values, row, 0);
  for (void* values : {p.label_mass, p.loss_slope, p.entropy}) {
    if (values != nullptr) set_acc(p, values, row, 0);
  }
  if (p.argmax != nullptr) p.argmax[row] = -1;
}

// From the cross-entropies of rows to their losses.
inline void finish_rows(const Params& p, int64_t begin, int64_t end) {
  if (!has_row_options(p) && !is_general(p)) return;
  for (int64_t row = begin; row < end; ++row) {
    if (is_left_out(p, row)) {
      finish_left_out(p, row);
      continue;
    }
    double loss = acc_at(p, p.row_loss, row);
    if (p.focal_gamma != 0) {
      const double mass = has_indices(p)
                              ? label_mass(on_target_of(p, row), spread_of(p), p.weight_sum)
                              : acc_at(p, p.label_mass, row);
      const FocalLoss<double> focal = focal_loss(loss, mass, p.focal_gamma);
      loss = focal.loss;
      set_acc(p, p.loss_slope, row, focal.slope);
    }
    if (p.lse_square_scale != 0) {
      const double lse = acc_at(p, p.row_max, row) + acc_at(p, p.log_sum, row);
      loss += p.lse_square_scale * lse * lse;
    }
    set_acc(p, p.row_loss, row, token_weight(p, row) * loss);
  }
}

inline void forward_tile(const Params& p, const Kernels& k, int64_t begin, int64_t end) {
  k.tile_forward(p, begin, end);
  finish_rows(p, begin, end);
}

// By the statistics of all of its classes.
template <typename Row>
void finish_row(const Params& p, const Kernels& k, int64_t row, const typename Row::Stats& stats,
                double target_logit) {
  if (Row::is_for_tiles(stats.max)) return forward_tile(p, k, row, row + 1);
  const double log_sum = log_sum_of(stats);
  // A transformed logit may differ by a rounding from the same one in a sweep.
  finish_forward(p, row, log_sum, std::min(target_logit, stats.max), stats);
  Row::finish(p, row, stats, log_sum);
  finish_rows(p, row, row + 1);
}

template <typename Row>
void forward_row(const Params& p, const Kernels& k, int64_t row) {
  if (is_left_out(p, row)) return finish_left_out(p, row);
  auto stats = Row::stats(p, k, row, 0, std::min(kSegmentClasses, p.vocab_size));
  for (int64_t j = kSegmentClasses; j < p.vocab_size; j += kSegmentClasses) {
    merge_stats(stats, Row::stats(p, k, row, j, std::min(j + kSegmentClasses, p.vocab_size)));
  }
  finish_row<Row>(p, k, row, stats, Row::target_logit(p, k, row).logit);
}

// The gradient of classes [begin, end) of a row, and the factors that all its segments share.
struct RowBackward {
  RowGradient gradient{};
  double at_target = 0;

  RowBackward() = default;
  RowBackward(const Params& p, int64_t row, const Transformed& target) {
    const double max = acc_at(p, p.row_max, row), log_sum = acc_at(p, p.log_sum, row);
    const Upstream<double> upstream = upstream_of(p, row);
    const double g = upstream.g, spread = spread_of(p), one_over_sum = std::exp(-log_sum);
    double on_target = 0, mass = p.weight_sum;
    if (has_indices(p)) {
      on_target = on_target_of(p, row);
      const double shifted = target.logit - max, log_p = shifted - log_sum, prob = std::exp(log_p);
      at_target = g * target_gradient(on_target, spread, prob, std::expm1(log_p), mass,
                                      class_weight(p, target_index(p, row)));
      if (prob != 0) at_target += prob * (upstream.softmax + upstream.shifted * shifted);
      at_target *= target.slope;
    } else {
      mass = acc_at(p, p.label_mass, row);
    }
    const double q = label_mass(on_target, spread, mass);
    gradient = {max, (g * q + upstream.softmax) * one_over_sum, g * spread,
                upstream.shifted * one_over_sum};
  }

  template <typename Row>
  void write(const Params& p, const Kernels& k, int64_t row, int64_t begin, int64_t end) const {
    Row::write_gradient(p, k, row, begin, end, gradient);
    write_target(p, k, row, begin, end);
  }

  void write_target(const Params& p, const Kernels& k, int64_t row, int64_t begin,
                    int64_t end) const {
    if (!has_indices(p)) return;
    const int64_t y = target_index(p, row);
    if (begin <= y && y < end) k.set_gradient(p, row, y, at_target);
  }
};

inline void zero_gradient(const Params& p, int64_t row, int64_t begin, int64_t end) {
  const int64_t size = element_size(p.dtype);
  char* out = static_cast<char*>(p.grad_logits) + row_offset(p.grad_layout, row) * size;
  std::memset(out + begin * size, 0, (end - begin) * size);
}

template <typename Row>
void backward_row(const Params& p, const Kernels& k, int64_t row) {
  if (is_left_out(p, row)) return zero_gradient(p, row, 0, p.vocab_size);
  if (Row::is_for_tiles(acc_at(p, p.row_max, row))) return k.tile_backward(p, row, row + 1);
  const RowBackward backward(p, row, Row::target_logit(p, k, row));
  backward.write<Row>(p, k, row, 0, p.vocab_size);
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
    finish_left_out(p, row);
    return zero_gradient(p, row, 0, p.vocab_size);
  }
  const Transformed target = PlainRow::target_logit(p, k, row);  // before it is overwritten
  const RowStats<double> stats = k.row_stats_saving(p, row, scratch);
  // Of 16 bits, the logits are still there.
  if (PlainRow::is_for_tiles(stats.max) && element_size(p.dtype) == 2) {
    forward_tile(p, k, row, row + 1);
    return k.tile_backward(p, row, row + 1);
  }
  finish_forward(p, row, log_sum_of(stats), target.logit, stats);
  finish_rows(p, row, row + 1);
  const RowBackward backward(p, row, target);
  k.row_gradient_of_saved(p, row, scratch, backward.gradient);
  backward.write_target(p, k, row, 0, p.vocab_size);
}

inline double grad_loss_of(const Params& p, int64_t row) {
  return acc_at(p, p.grad_loss, row * p.grad_loss_stride) * p.grad_scale;
}

inline void scale_row(const Params& p, const Kernels& k, int64_t row) {
  if (!is_left_out(p, row)) k.segment_scale(p, row, 0, p.vocab_size, grad_loss_of(p, row));
}

}  // namespace fused_xent::cpu
