// The CPU kernels of one instruction set, as plain functions on one thread. launch.cpp decides
// which of them run, on which rows and in which threads.
#pragma once

#include <cstdint>

#include "row_inputs.h"

namespace fused_xent::cpu {

// Rows of a tile, and classes of a segment: a segment's sums are added up in float or double, and
// those of several segments in double. Both are fixed, so that no result depends on the number of
// threads.
constexpr int64_t kTileRows = 256;
constexpr int64_t kSegmentClasses = 16384;

// Classes of a block, which a row kernel keeps in the first-level cache: 4 to 16 KiB of logits.
constexpr int64_t kBlock = 2048;

// Rows whose maximum is not between -kMaxOrigin and kMaxOrigin are left to the tile kernels: the
// row kernels need log2(e) * max to have a fraction.
constexpr double kMaxOrigin = 0x1p24;

// Memory of one row between its forward and its backward, where both run at once.
struct RowScratch {
  float* exponentials;  // one per class of 16-bit logits; those of others overwrite the logits
  double* origins;      // one per block: what its exponentials are relative to
};

// The statistics of some classes of a row. max is their maximum, but not below the number that a
// sweep starts with: -kMaxOrigin, or the lowest number if the exponentials overwrite the logits.
// The sums are relative to sums.max, which is close to max.
struct SegmentStats {
  FullStats<double> sums;
  double max;
};

// Rows [begin, begin + n). The loops over their classes take one row after another. Everything else
// is computed for several rows at once, one in each vector lane.
constexpr int kBatchRows = 16;
struct RowBatch {
  int64_t begin;
  int n;
  int64_t kept[kBatchRows];    // -1, or 0 for rows that are left out
  int64_t target[kBatchRows];  // -1 for probabilities and for rows that are left out
  double target_weight[kBatchRows], label_weight[kBatchRows];  // see labels_of
  double target_logit[kBatchRows], target_slope[kBatchRows];

  SegmentStats stats[kBatchRows];  // of all classes but class_apart
  double max[kBatchRows], log_sum[kBatchRows];
  double one_over_sum[kBatchRows];  // by which the saved exponentials are probabilities

  double origin[kBatchRows], factor[kBatchRows], shifted_factor[kBatchRows], spread[kBatchRows];
  double log2_factor[kBatchRows];  // of |factor|; only where RoundedExp needs it
  double at_target[kBatchRows];

  // By exponentials that are relative to origin.
  FullGradient<double> gradient(int i) const {
    return {{origin[i], factor[i], spread[i]}, shifted_factor[i]};
  }
};

struct Kernels {
  // Row kernels: adjacent classes in vector lanes, so the class stride must be 1. Without per-class
  // options (see is_general) they serve only rows whose maximum is within kMaxOrigin.
  // The statistics and the gradient of classes [begin, end) of one row. The statistics leave
  // class_apart out.
  SegmentStats (*segment_stats)(const Params&, int64_t row, int64_t begin, int64_t end);
  void (*segment_gradient)(const Params&, const RowBatch&, int i, int64_t begin, int64_t end);
  void (*segment_scale)(const Params&, int64_t row, int64_t begin, int64_t end, double factor);
  // A whole row without per-class options: the first saves the exponentials, the second turns them
  // into the gradient, which takes the logits' place. Float32 and float64 rows, whose exponentials
  // are saved over the logits, may have any maximum.
  SegmentStats (*row_stats_saving)(const Params&, int64_t row, const RowScratch&);
  void (*row_gradient_of_saved)(const Params&, const RowBatch&, int i, const RowScratch&);
  // The rest of the work on a batch. Reads the targets and their logits, which may be overwritten
  // later.
  void (*read_targets)(const Params&, RowBatch&);
  // Turns the statistics into results.
  void (*finish_batch)(const Params&, RowBatch&);
  // Computes what gradients are computed from. saved: the statistics are those of row_stats_saving.
  void (*start_gradients)(const Params&, RowBatch&, bool saved);

  // Tile kernels: adjacent rows in vector lanes. All classes of at most kTileRows rows
  // [begin, end), with per-class options or without.
  void (*tile_forward)(const Params&, int64_t begin, int64_t end);
  void (*tile_backward)(const Params&, int64_t begin, int64_t end);
  void (*tile_scale)(const Params&, int64_t begin, int64_t end);

  // Rows [begin, end) of sparse labels, whose classes are in range: see SparseLabels.
  void (*read_labels)(const Params&, const SparseLabels&, int64_t begin, int64_t end);
  void (*write_label_gradients)(const Params&, const SparseLabels&, int64_t begin, int64_t end);
  void (*write_log_probs)(const Params&, const SparseLabels&, int64_t begin, int64_t end);
};

// The kernels for p's dtypes and options: one file for each instruction set.
Kernels portable_kernels(const Params& p);
Kernels avx2_kernels(const Params& p);
Kernels avx512_kernels(const Params& p);
Kernels avx512_bf16_kernels(const Params& p);

// Those of the instruction set in use.
Kernels kernels_in_use(const Params& p);

}  // namespace fused_xent::cpu
