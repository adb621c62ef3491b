// Sums over rows that need no logits, and the check of their targets.
#include <numeric>
#include <vector>

#include "kernels.h"
#include "launch.h"
#include "tasks.h"

namespace fused_xent::cpu {
namespace {

// Rows, or labels, of a task. It is fixed, so that no sum depends on the number of threads.
constexpr int64_t kBlockRows = 8192;

template <typename Index>
RowScan scan_indices(const Params& p, const Index* target, int64_t begin, int64_t end) {
  RowScan scan;
  int64_t n_kept = 0, n_bad = 0;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t y = target[row];
    const bool keep = y != p.ignore_index;
    n_kept += keep;
    n_bad += keep & (static_cast<uint64_t>(y) >= static_cast<uint64_t>(p.vocab_size));
  }
  scan.total_weight = static_cast<double>(n_kept);
  if (n_bad == 0 && p.weight == nullptr && p.token_weight == nullptr) return scan;
  scan.total_weight = 0;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t y = target[row];
    if (is_left_out(p, row)) continue;
    if (0 <= y && y < p.vocab_size) {
      scan.total_weight += class_weight(p, y) * token_weight(p, row);
    } else if (scan.bad_row < 0) {
      scan.bad_row = row;
    }
  }
  return scan;
}

RowScan scan_block(const Params& p, int64_t begin, int64_t end) {
  if (has_indices(p)) {
    return with_indices(p, [&](const auto* y) { return scan_indices(p, y, begin, end); });
  }
  RowScan scan;
  scan.total_weight = static_cast<double>(end - begin);
  if (p.token_weight == nullptr) return scan;
  scan.total_weight = 0;
  for (int64_t row = begin; row < end; ++row) scan.total_weight += token_weight(p, row);
  return scan;
}

// In four sums, which the processor adds to at the same time.
template <typename A>
double sum_of(const A* values, int64_t count) {
  double sums[4] = {};
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    for (int k = 0; k < 4; ++k) sums[k] += values[i + k];
  }
  for (; i < count; ++i) sums[0] += values[i];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

BadLabel bad_label_of(const Params& p, const SparseLabels& sparse, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (token_weight(p, row) == 0) continue;
    int64_t at = row_offset(sparse.classes_layout, row);
    for (int64_t k = 0; k < sparse.n_labels; ++k, at += sparse.classes_layout.class_stride) {
      const int64_t y = class_of_label(sparse, at);
      if ((0 <= y && y < p.vocab_size) || y == sparse.ignore_index) continue;
      return {row, k, y};
    }
  }
  return {};
}

// The results of block(begin, end) for blocks of `step` rows, in the order of the rows.
template <typename Block>
auto results_of_blocks(const Params& p, const Threads& threads, int64_t step, const Block& block) {
  std::vector<decltype(block(0, 0))> results(ceil_div(p.n_rows, step));
  run_pieces(threads, p.n_rows, step,
             [&](int64_t begin, int64_t end) { results[begin / step] = block(begin, end); });
  return results;
}

}  // namespace

BadLabel find_bad_label(const Params& p, const SparseLabels& sparse, const Threads& threads) {
  const int64_t step = ceil_div(kBlockRows, sparse.n_labels);
  const auto found = results_of_blocks(p, threads, step, [&](int64_t begin, int64_t end) {
    return bad_label_of(p, sparse, begin, end);
  });
  for (const BadLabel& bad : found) {
    if (bad.row >= 0) return bad;
  }
  return {};
}

RowScan scan_rows(const Params& p, const Threads& threads) {
  const auto scans = results_of_blocks(p, threads, kBlockRows, [&](int64_t begin, int64_t end) {
    return scan_block(p, begin, end);
  });
  RowScan all;
  for (const RowScan& block : scans) {
    if (all.bad_row < 0) all.bad_row = block.bad_row;
    all.total_weight += block.total_weight;
  }
  return all;
}

double sum_rows(const Params& p, const Threads& threads) {
  const auto sums = results_of_blocks(p, threads, kBlockRows, [&](int64_t begin, int64_t end) {
    return p.dtype == DType::float64
               ? sum_of(static_cast<const double*>(p.row_loss) + begin, end - begin)
               : sum_of(static_cast<const float*>(p.row_loss) + begin, end - begin);
  });
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

}  // namespace fused_xent::cpu
