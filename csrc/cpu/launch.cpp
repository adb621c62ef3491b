#include "launch.h"

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "row_passes.h"
#include "tasks.h"

namespace fused_xent::cpu {
namespace {

constexpr int64_t kTaskElements = 32768;  // logits of a task
constexpr int64_t kTaskLabels = 4096;     // sparse labels of a task
constexpr int64_t kSavedBytes = 24576;    // of a batch in forward_backward
constexpr int64_t kFewRows = 16;          // below: several threads on a row, in forward_backward
constexpr int64_t kMaxTileVocab = 128;    // up to here a row has too few vectors for row kernels

// Calls body(begin, end) for batches of at most `size` rows.
template <typename Body>
void for_batches(int64_t begin, int64_t end, int64_t size, const Body& body) {
  for (; begin < end; begin += size) body(begin, std::min(begin + size, end));
}

// The same for all rows, in tasks of about kTaskElements logits.
template <typename Body>
void run_batches(const Params& p, const Threads& threads, int64_t most, const Body& body) {
  const int64_t wanted = ceil_div(kTaskElements, p.vocab_size);
  const int64_t size = std::min(most, wanted), step = wanted / size * size;
  run_pieces(threads, p.n_rows, step,
             [&](int64_t begin, int64_t end) { for_batches(begin, end, size, body); });
}

// The rows of a batch of forward_backward: the second loop over their classes finds logits and
// exponentials in the first-level cache.
int64_t saved_rows(const Params& p) {
  const int64_t size = element_size(p.dtype), bytes = size == 2 ? 2 + 4 : size;
  return std::clamp<int64_t>(kSavedBytes / (bytes * p.vocab_size), 1, kBatchRows);
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
  std::vector<SegmentStats> stats(p.n_rows * n_segments);
  run_segments(p, threads, [&](int64_t row, int64_t i, int64_t begin, int64_t end) {
    if (!is_left_out(p, row)) stats[i] = k.segment_stats(p, row, begin, end);
  });
  for_batches(0, p.n_rows, kBatchRows, [&](int64_t begin, int64_t end) {
    RowBatch batch = batch_of(p, k, begin, end);
    for (int i = 0; i < batch.n; ++i) {
      const SegmentStats* of_row = &stats[(begin + i) * n_segments];
      batch.stats[i] = of_row[0];
      for (int64_t s = 1; s < n_segments; ++s) merge_segments(batch.stats[i], of_row[s]);
    }
    finish_batch_or_tiles(p, k, batch);
  });
}

void backward_segments(const Params& p, const Kernels& k, const Threads& threads) {
  std::vector<RowBatch> batches;  // of all rows first: the gradient may overwrite the logits
  for_batches(0, p.n_rows, kBatchRows, [&](int64_t begin, int64_t end) {
    batches.push_back(batch_of(p, k, begin, end));
    k.start_gradients(p, batches.back(), false);
  });
  run_segments(p, threads, [&](int64_t row, int64_t, int64_t begin, int64_t end) {
    write_gradient(p, k, batches[row / kBatchRows], row % kBatchRows, begin, end);
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

// Calls tile(begin, end) for all tiles, in tasks of neighbouring tiles. A tile ends where the
// innermost row dimension ends, because rows are no longer adjacent after that. Where that would
// leave most lanes empty, tiles reach over the end.
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

// ---- sparse labels ---------------------------------------------------------------------------

using LabelKernel = void (*)(const Params&, const SparseLabels&, int64_t, int64_t);

void run_label_kernel(LabelKernel kernel, const Params& p, const SparseLabels& sparse,
                      const Threads& threads) {
  run_pieces(threads, p.n_rows, ceil_div(kTaskLabels, sparse.n_labels),
             [&](int64_t begin, int64_t end) { kernel(p, sparse, begin, end); });
}

}  // namespace

void read_labels(const Params& p, const SparseLabels& sparse, const Threads& threads) {
  run_label_kernel(kernels_in_use(p).read_labels, p, sparse, threads);
}

void write_label_gradients(const Params& p, const SparseLabels& sparse, const Threads& threads) {
  run_label_kernel(kernels_in_use(p).write_label_gradients, p, sparse, threads);
}

void write_log_probs(const Params& p, const SparseLabels& sparse, const Threads& threads) {
  run_label_kernel(kernels_in_use(p).write_log_probs, p, sparse, threads);
}

void forward(const Params& p, const Threads& threads) {
  if (p.n_rows == 0) return;
  const Kernels k = kernels_in_use(p);
  if (needs_tiles(p, p.logits_layout)) {
    run_tiles(p, p.logits_layout, threads,
              [&](int64_t begin, int64_t end) { k.tile_forward(p, begin, end); });
  } else if (has_few_rows(p, threads)) {
    forward_segments(p, k, threads);
  } else {
    run_batches(p, threads, kBatchRows,
                [&](int64_t begin, int64_t end) { forward_batch(p, k, begin, end); });
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
    run_batches(p, threads, kBatchRows,
                [&](int64_t begin, int64_t end) { backward_batch(p, k, begin, end); });
  }
}

// Where rows save their exponentials, the gradient differs in its last bits between rows and
// segments. So the choice between them does not depend on the number of threads.
void forward_backward(const Params& p, const Threads& threads) {
  if (p.n_rows == 0) return;
  const Kernels k = kernels_in_use(p);
  if (needs_tiles(p, p.logits_layout)) {
    run_tiles(p, p.logits_layout, threads, [&](int64_t begin, int64_t end) {
      k.tile_forward(p, begin, end);
      k.tile_backward(p, begin, end);
    });
  } else if (is_general(p)) {
    run_batches(p, threads, saved_rows(p), [&](int64_t begin, int64_t end) {
      forward_batch(p, k, begin, end);
      backward_batch(p, k, begin, end);
    });
  } else if (p.n_rows < kFewRows && p.vocab_size > kSegmentClasses) {
    forward_segments(p, k, threads);
    backward_segments(p, k, threads);
  } else {
    run_batches(p, threads, saved_rows(p), [&](int64_t begin, int64_t end) {
      thread_local ScratchMemory memory;
      forward_backward_batch(p, k, begin, end, memory);
    });
  }
}

void scale_gradient(const Params& p, const Threads& threads) {
  if (p.n_rows == 0 || (p.grad_loss_stride == 0 && grad_loss_of(p, 0) == 1)) return;
  const Kernels k = kernels_in_use(p);
  if (needs_tiles(p, p.grad_layout)) {
    run_tiles(p, p.grad_layout, threads,
              [&](int64_t begin, int64_t end) { k.tile_scale(p, begin, end); });
  } else {
    run_batches(p, threads, 1, [&](int64_t row, int64_t) {
      if (!is_left_out(p, row)) k.segment_scale(p, row, 0, p.vocab_size, grad_loss_of(p, row));
    });
  }
}

}  // namespace fused_xent::cpu
