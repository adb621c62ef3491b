#include "launch.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "tasks.h"

namespace fused_xent::cpu {
namespace {

constexpr int64_t kTaskElements = 32768;  // logits that are worth a task of their own
constexpr int64_t kFewRows = 16;          // for fused mode, see forward_backward
constexpr int64_t kMaxTileVocab = 128;    // up to here a row has too few vectors to fill a sweep

// Calls row_body(row) for all rows, in tasks of about kTaskElements logits.
template <typename RowBody>
void run_rows(const Params& p, const Threads& threads, const RowBody& row_body) {
  const int64_t step = ceil_div(kTaskElements, p.vocab_size);
  run_tasks(threads, ceil_div(p.n_rows, step), [&](int64_t i) {
    const int64_t end = std::min(p.n_rows, (i + 1) * step);
    for (int64_t row = i * step; row < end; ++row) row_body(row);
  });
}

void set_acc(const Params& p, void* values, int64_t i, double value) {
  if (p.dtype == DType::float64) {
    static_cast<double*>(values)[i] = value;
  } else {
    static_cast<float*>(values)[i] = static_cast<float>(value);
  }
}

bool has_indices(const Params& p) { return p.target_kind != TargetKind::probabilities; }

bool is_ignored(const Params& p, int64_t row) {
  return has_indices(p) && target_index(p, row) == p.ignore_index;
}

double spread_of(const Params& p) {
  return has_indices(p) ? p.label_smoothing / static_cast<double>(p.vocab_size) : 1.0;
}

double upstream(const Params& p, int64_t row) {
  return acc_at(p, p.grad_loss, row * p.grad_loss_stride) * p.grad_scale;
}

// ---- one row, by the row kernels -------------------------------------------------------------

// 0 for probabilities, which have no one target.
double target_logit(const Params& p, const Kernels& k, int64_t row) {
  return has_indices(p) ? k.logit(p, row, target_index(p, row)) : 0;
}

void finish_forward(const Params& p, int64_t row, double target_logit,
                    const RowStats<double>& stats) {
  // The maximum's own term is 1, and may come out a little below.
  const double log_sum = 0 < stats.sum && stats.sum < 1 ? 0 : std::log(stats.sum);
  double loss;
  if (has_indices(p)) {
    const int64_t y = target_index(p, row);
    loss = index_loss((1 - p.label_smoothing) * class_weight(p, y), spread_of(p),
                      target_logit - stats.max, log_sum, stats.mass, stats.dot);
  } else {
    loss = probability_loss(log_sum, stats.mass, stats.dot);
    set_acc(p, p.label_mass, row, stats.mass);
  }
  set_acc(p, p.row_loss, row, loss);
  set_acc(p, p.row_max, row, stats.max);
  set_acc(p, p.log_sum, row, log_sum);
}

void finish_ignored(const Params& p, int64_t row) {
  for (void* values : {p.row_loss, p.row_max, p.log_sum}) set_acc(p, values, row, 0);
}

// See kMaxOrigin.
bool is_for_tiles(double max) { return !(std::fabs(max) < kMaxOrigin); }

void forward_row(const Params& p, const Kernels& k, int64_t row) {
  if (is_ignored(p, row)) return finish_ignored(p, row);
  RowStats<double> stats = k.segment_stats(p, row, 0, std::min(kSegmentClasses, p.vocab_size));
  for (int64_t j = kSegmentClasses; j < p.vocab_size; j += kSegmentClasses) {
    merge_stats(stats, k.segment_stats(p, row, j, std::min(j + kSegmentClasses, p.vocab_size)));
  }
  if (is_for_tiles(stats.max)) return k.tile_forward(p, row, row + 1);
  finish_forward(p, row, target_logit(p, k, row), stats);
}

// The gradient of classes [begin, end) of a row, and the factors that all its segments share.
struct RowBackward {
  RowGradient gradient{};
  double at_target = 0;

  RowBackward() = default;
  RowBackward(const Params& p, int64_t row, double target_logit) {
    const double max = acc_at(p, p.row_max, row), log_sum = acc_at(p, p.log_sum, row);
    const double g = upstream(p, row), spread = spread_of(p);
    double on_target = 0, mass = p.weight_sum;
    if (has_indices(p)) {
      const int64_t y = target_index(p, row);
      on_target = (1 - p.label_smoothing) * class_weight(p, y);
      const double log_p = (target_logit - max) - log_sum;
      at_target = g * target_gradient(on_target, spread, std::exp(log_p), std::expm1(log_p), mass,
                                      class_weight(p, y));
    } else {
      mass = acc_at(p, p.label_mass, row);
    }
    gradient = {max, g * label_mass(on_target, spread, mass) * std::exp(-log_sum), g * spread};
  }

  void write(const Params& p, const Kernels& k, int64_t row, int64_t begin, int64_t end) const {
    k.segment_gradient(p, row, begin, end, gradient);
    write_target(p, k, row, begin, end);
  }

  void write_target(const Params& p, const Kernels& k, int64_t row, int64_t begin,
                    int64_t end) const {
    if (!has_indices(p)) return;
    const int64_t y = target_index(p, row);
    if (begin <= y && y < end) k.set_gradient(p, row, y, at_target);
  }
};

void zero_gradient(const Params& p, int64_t row, int64_t begin, int64_t end) {
  const int64_t size = element_size(p.dtype);
  char* out = static_cast<char*>(p.grad_logits) + row_offset(p.grad_layout, row) * size;
  std::memset(out + begin * size, 0, (end - begin) * size);
}

void backward_row(const Params& p, const Kernels& k, int64_t row) {
  if (is_ignored(p, row)) return zero_gradient(p, row, 0, p.vocab_size);
  if (is_for_tiles(acc_at(p, p.row_max, row))) return k.tile_backward(p, row, row + 1);
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

void forward_backward_row(const Params& p, const Kernels& k, int64_t row,
                          const RowScratch& scratch) {
  if (is_ignored(p, row)) {
    finish_ignored(p, row);
    return zero_gradient(p, row, 0, p.vocab_size);
  }
  const double logit = target_logit(p, k, row);  // before it is overwritten
  const RowStats<double> stats = k.row_stats_saving(p, row, scratch);
  if (is_for_tiles(stats.max) && element_size(p.dtype) == 2) {  // then the logits are still there
    k.tile_forward(p, row, row + 1);
    return k.tile_backward(p, row, row + 1);
  }
  finish_forward(p, row, logit, stats);
  const RowBackward backward(p, row, logit);
  k.row_gradient_of_saved(p, row, scratch, backward.gradient);
  backward.write_target(p, k, row, 0, p.vocab_size);
}

void scale_row(const Params& p, const Kernels& k, int64_t row) {
  if (!is_ignored(p, row)) k.segment_scale(p, row, 0, p.vocab_size, upstream(p, row));
}

// ---- few rows: each one's segments in several threads ----------------------------------------

// Calls segment(row, index, begin, end) for all segments of all rows.
template <typename Segment>
void run_segments(const Params& p, const Threads& threads, const Segment& segment) {
  const int64_t n_segments = ceil_div(p.vocab_size, kSegmentClasses);
  run_tasks(threads, p.n_rows * n_segments, [&](int64_t i) {
    const int64_t begin = i % n_segments * kSegmentClasses;
    segment(i / n_segments, i, begin, std::min(begin + kSegmentClasses, p.vocab_size));
  });
}

void forward_segments(const Params& p, const Kernels& k, const Threads& threads) {
  const int64_t n_segments = ceil_div(p.vocab_size, kSegmentClasses);
  std::vector<RowStats<double>> stats(p.n_rows * n_segments);
  run_segments(p, threads, [&](int64_t row, int64_t i, int64_t begin, int64_t end) {
    if (!is_ignored(p, row)) stats[i] = k.segment_stats(p, row, begin, end);
  });
  for (int64_t row = 0; row < p.n_rows; ++row) {
    if (is_ignored(p, row)) {
      finish_ignored(p, row);
      continue;
    }
    RowStats<double> merged = stats[row * n_segments];
    for (int64_t i = 1; i < n_segments; ++i) merge_stats(merged, stats[row * n_segments + i]);
    if (is_for_tiles(merged.max)) {
      k.tile_forward(p, row, row + 1);
      continue;
    }
    finish_forward(p, row, target_logit(p, k, row), merged);
  }
}

void backward_segments(const Params& p, const Kernels& k, const Threads& threads) {
  std::vector<RowBackward> rows;  // of all rows first: the gradient may overwrite the logits
  for (int64_t row = 0; row < p.n_rows; ++row) {
    rows.push_back(is_ignored(p, row) ? RowBackward()
                                      : RowBackward(p, row, target_logit(p, k, row)));
  }
  run_segments(p, threads, [&](int64_t row, int64_t, int64_t begin, int64_t end) {
    if (is_ignored(p, row)) return zero_gradient(p, row, begin, end);
    if (!is_for_tiles(acc_at(p, p.row_max, row))) return rows[row].write(p, k, row, begin, end);
    if (begin == 0) k.tile_backward(p, row, row + 1);
  });
}

bool has_few_rows(const Params& p, const Threads& threads) {
  return p.n_rows < 4 * threads.count && p.vocab_size > kSegmentClasses;
}

// ---- tiles -----------------------------------------------------------------------------------

bool needs_tiles(const Params& p, const Layout& layout) {
  return p.vocab_size <= kMaxTileVocab || layout.class_stride != 1 ||
         (!has_indices(p) && p.target_layout.class_stride != 1);
}

// Calls tile(begin, end) for all tiles, in tasks of neighbours. None reaches over the end of the
// innermost row dimension, beyond which rows are no longer adjacent, unless that would leave most
// lanes empty.
template <typename Tile>
void run_tiles(const Params& p, const Layout& layout, const Threads& threads, const Tile& tile) {
  int64_t inner = layout.size[layout.n_dims - 1];
  if (inner < kTileRows) inner = p.n_rows;
  const int64_t per_inner = ceil_div(inner, kTileRows), n_tiles = p.n_rows / inner * per_inner;
  const int64_t step = ceil_div(kTaskElements, kTileRows * std::max<int64_t>(p.vocab_size, 1));
  run_tasks(threads, ceil_div(n_tiles, step), [&](int64_t task) {
    for (int64_t i = task * step; i < std::min((task + 1) * step, n_tiles); ++i) {
      const int64_t first = i / per_inner * inner, begin = first + i % per_inner * kTileRows;
      tile(begin, std::min(begin + kTileRows, first + inner));
    }
  });
}

}  // namespace

void forward(const Params& p, const Threads& threads) {
  if (p.n_rows == 0) return;
  const Kernels k = kernels_in_use(p);
  if (needs_tiles(p, p.logits_layout)) {
    run_tiles(p, p.logits_layout, threads,
              [&](int64_t begin, int64_t end) { k.tile_forward(p, begin, end); });
  } else if (has_few_rows(p, threads)) {
    forward_segments(p, k, threads);
  } else {
    run_rows(p, threads, [&](int64_t row) { forward_row(p, k, row); });
  }
}

void backward(const Params& p, const Threads& threads) {
  if (p.n_rows == 0) return;
  const Kernels k = kernels_in_use(p);
  if (needs_tiles(p, p.logits_layout) || p.grad_layout.class_stride != 1) {
    run_tiles(p, p.logits_layout, threads,
              [&](int64_t begin, int64_t end) { k.tile_backward(p, begin, end); });
  } else if (has_few_rows(p, threads)) {
    backward_segments(p, k, threads);
  } else {
    run_rows(p, threads, [&](int64_t row) { backward_row(p, k, row); });
  }
}

// By rows or by segments, the gradient differs in its last bits here, where rows save their
// exponentials. So the choice does not depend on the number of threads.
void forward_backward(const Params& p, const Threads& threads) {
  if (p.n_rows == 0) return;
  const Kernels k = kernels_in_use(p);
  if (needs_tiles(p, p.logits_layout)) {
    run_tiles(p, p.logits_layout, threads, [&](int64_t begin, int64_t end) {
      k.tile_forward(p, begin, end);
      k.tile_backward(p, begin, end);
    });
  } else if (p.n_rows < kFewRows && p.vocab_size > kSegmentClasses) {
    forward_segments(p, k, threads);
    backward_segments(p, k, threads);
  } else {
    run_rows(p, threads, [&](int64_t row) {
      thread_local ScratchMemory memory;
      forward_backward_row(p, k, row, memory.for_row(p));
    });
  }
}

void scale_gradient(const Params& p, const Threads& threads) {
  if (p.n_rows == 0 || (p.grad_loss_stride == 0 && upstream(p, 0) == 1)) return;
  const Kernels k = kernels_in_use(p);
  if (needs_tiles(p, p.grad_layout)) {
    run_tiles(p, p.grad_layout, threads,
              [&](int64_t begin, int64_t end) { k.tile_scale(p, begin, end); });
  } else {
    run_rows(p, threads, [&](int64_t row) { scale_row(p, k, row); });
  }
}

}  // namespace fused_xent::cpu
