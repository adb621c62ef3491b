// Forward and backward of a batch of rows by the row kernels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels.h"

namespace fused_xent::cpu {

inline RowBatch batch_of(const Params& p, const Kernels& k, int64_t begin, int64_t end) {
  RowBatch batch;
  batch.begin = begin;
  batch.n = static_cast<int>(end - begin);
  k.read_targets(p, batch);
  return batch;
}

// Adds the statistics of other classes of the same row.
inline void merge_segments(SegmentStats& stats, const SegmentStats& other) {
  merge_stats(stats.sums, other.sums);
  stats.max = std::max(stats.max, other.max);
}

// True if the row's maximum, which the batch has by now, is not one for row kernels: see
// kMaxOrigin.
inline bool is_for_tiles(const Params& p, const RowBatch& batch, int i) {
  return !(std::fabs(batch.max[i]) < kMaxOrigin) && batch.kept[i] && !is_general(p);
}

inline void finish_batch_or_tiles(const Params& p, const Kernels& k, RowBatch& batch) {
  k.finish_batch(p, batch);
  for (int i = 0; i < batch.n; ++i) {
    const int64_t row = batch.begin + i;
    if (is_for_tiles(p, batch, i)) k.tile_forward(p, row, row + 1);
  }
}

inline void forward_batch(const Params& p, const Kernels& k, int64_t begin, int64_t end) {
  RowBatch batch = batch_of(p, k, begin, end);
  for (int i = 0; i < batch.n; ++i) {
    if (!batch.kept[i]) continue;
    SegmentStats& stats = batch.stats[i];
    stats = k.segment_stats(p, begin + i, 0, std::min(kSegmentClasses, p.vocab_size));
    for (int64_t j = kSegmentClasses; j < p.vocab_size; j += kSegmentClasses) {
      const int64_t segment_end = std::min(j + kSegmentClasses, p.vocab_size);
      merge_segments(stats, k.segment_stats(p, begin + i, j, segment_end));
    }
  }
  finish_batch_or_tiles(p, k, batch);
}

inline void zero_gradient(const Params& p, int64_t row, int64_t begin, int64_t end) {
  const int64_t size = element_size(p.dtype);
  char* out = static_cast<char*>(p.grad_logits) + row_offset(p.grad_layout, row) * size;
  std::memset(out + begin * size, 0, (end - begin) * size);
}

// The gradient of classes [begin, end) of row i of a batch.
inline void write_gradient(const Params& p, const Kernels& k, const RowBatch& batch, int i,
                           int64_t begin, int64_t end) {
  const int64_t row = batch.begin + i;
  if (!batch.kept[i]) return zero_gradient(p, row, begin, end);
  if (!is_for_tiles(p, batch, i)) return k.segment_gradient(p, batch, i, begin, end);
  if (begin == 0) k.tile_backward(p, row, row + 1);
}

inline void backward_batch(const Params& p, const Kernels& k, int64_t begin, int64_t end) {
  RowBatch batch = batch_of(p, k, begin, end);
  k.start_gradients(p, batch, false);
  for (int i = 0; i < batch.n; ++i) write_gradient(p, k, batch, i, 0, p.vocab_size);
}

// The memory of the RowScratch of several rows, kept by each thread.
struct ScratchMemory {
  std::vector<float> exponentials;
  std::vector<double> origins;

  void resize(const Params& p, int n_rows) {
    if (element_size(p.dtype) == 2) exponentials.resize(n_rows * p.vocab_size);
    origins.resize(n_rows * ceil_div(p.vocab_size, kBlock));
  }
  RowScratch of_row(const Params& p, int i) {
    return {exponentials.data() + i * p.vocab_size,
            origins.data() + i * ceil_div(p.vocab_size, kBlock)};
  }
};

inline void forward_backward_batch(const Params& p, const Kernels& k, int64_t begin, int64_t end,
                                   ScratchMemory& memory) {
  RowBatch batch = batch_of(p, k, begin, end);
  memory.resize(p, batch.n);
  for (int i = 0; i < batch.n; ++i) {
    if (!batch.kept[i]) continue;
    batch.stats[i] = k.row_stats_saving(p, begin + i, memory.of_row(p, i));
  }
  k.finish_batch(p, batch);
  k.start_gradients(p, batch, true);
  for (int i = 0; i < batch.n; ++i) {
    const int64_t row = begin + i;
    if (!batch.kept[i]) {
      zero_gradient(p, row, 0, p.vocab_size);
    } else if (is_for_tiles(p, batch, i) && element_size(p.dtype) == 2) {
      k.tile_forward(p, row, row + 1);  // 16-bit logits have not been overwritten yet
      k.tile_backward(p, row, row + 1);
    } else {
      k.row_gradient_of_saved(p, batch, i, memory.of_row(p, i));
    }
  }
}

}  // namespace fused_xent::cpu
