// The CPU kernels of one instruction set, as plain functions on one thread. launch.cpp decides
// which of them run, on what and in which threads.
#pragma once

#include <cstdint>

#include "rows.h"

namespace fused_xent::cpu {

// Rows that a tile holds, and classes of a row that are swept before the sum goes to double. Both
// are fixed, so that no result depends on the number of threads.
constexpr int64_t kTileRows = 256;
constexpr int64_t kSegmentClasses = 16384;

// Classes that a row kernel keeps in the first-level cache: 4 to 16 KiB of logits.
constexpr int64_t kBlock = 2048;

// Rows whose maximum is not between these, in size, are for the tile kernels: those by rows count
// on log2(e) max having a fraction.
constexpr double kMaxOrigin = 0x1p24;

// One row's gradient at class j is
//     (logit_factor + shifted_factor * (x_j - max)) * exp(x_j - max) - spread * t_j
// by the logit that the softmax sees. Only the general kernels know of shifted_factor.
struct RowGradient {
  double max;
  double logit_factor;
  double spread;
  double shifted_factor;
};

// A logit as the softmax sees it, and its derivative by the logit as it is.
struct Transformed {
  double logit, slope;
};

// What a row's forward leaves for its backward where both run at once.
struct RowScratch {
  float* exponentials;  // one a class; for 16-bit logits alone: others have room in their place
  double* origins;      // one a block: what its exponentials are relative to
};

struct Kernels {
  // Adjacent classes in vector lanes: classes [begin, end) of one row. Class stride 1. Only where
  // the row's maximum is within kMaxOrigin is what they give of use.
  RowStats<double> (*segment_stats)(const Params&, int64_t row, int64_t begin, int64_t end);
  void (*segment_gradient)(const Params&, int64_t row, int64_t begin, int64_t end, RowGradient);
  // The same for a whole row, the gradient in place of the logits and without their exponentials.
  // Any maximum will do where these are saved over the logits.
  RowStats<double> (*row_stats_saving)(const Params&, int64_t row, const RowScratch&);
  void (*row_gradient_of_saved)(const Params&, int64_t row, const RowScratch&, RowGradient);
  void (*segment_scale)(const Params&, int64_t row, int64_t begin, int64_t end, double factor);
  // The same where is_general(p). Any maximum will do.
  FullStats<double> (*general_stats)(const Params&, int64_t row, int64_t begin, int64_t end);
  void (*general_gradient)(const Params&, int64_t row, int64_t begin, int64_t end, RowGradient);
  // One element of a row.
  Transformed (*transformed_logit)(const Params&, int64_t row, int64_t index);
  double (*logit)(const Params&, int64_t row, int64_t index);
  void (*set_gradient)(const Params&, int64_t row, int64_t index, double value);

  // Adjacent rows in vector lanes, general or not: all classes of at most kTileRows rows [begin,
  // end).
  void (*tile_forward)(const Params&, int64_t begin, int64_t end);
  void (*tile_backward)(const Params&, int64_t begin, int64_t end);
  void (*tile_scale)(const Params&, int64_t begin, int64_t end);
};

// The kernels for p's dtypes, one file an instruction set.
Kernels portable_kernels(const Params& p);
Kernels avx2_kernels(const Params& p);
Kernels avx512_kernels(const Params& p);
Kernels avx512_bf16_kernels(const Params& p);

// Those of the instruction set in use.
Kernels kernels_in_use(const Params& p);

}  // namespace fused_xent::cpu
