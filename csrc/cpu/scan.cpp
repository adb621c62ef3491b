// Sums over rows that need no logits, and the check of their targets.
#include <vector>

#include "kernels.h"
#include "launch.h"
#include "tasks.h"

namespace fused_xent::cpu {
namespace {

constexpr int64_t kBlockRows = 8192;  // rows, or labels, a task; fixed, so that no sum depends on
                                      // the threads

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

}  // namespace

BadLabel find_bad_label(const Params& p, const SparseLabels& sparse, const Threads& threads) {
  const int64_t step = ceil_div(kBlockRows, sparse.n_labels);
  std::vector<BadLabel> blocks(ceil_div(p.n_rows, step));
  run_tasks(threads, blocks.size(), [&](int64_t i) {
    blocks[i] = bad_label_of(p, sparse, i * step, std::min(p.n_rows, (i + 1) * step));
  });
  for (const BadLabel& bad : blocks) {
    if (bad.row >= 0) return bad;
  }
  return {};
}

RowScan scan_rows(const Params& p, const Threads& threads) {
  std::vector<RowScan> blocks(ceil_div(p.n_rows, kBlockRows));
  run_tasks(threads, blocks.size(), [&](int64_t i) {
    blocks[i] = scan_block(p, i * kBlockRows, std::min(p.n_rows, (i + 1) * kBlockRows));
  });
  RowScan all;
  for (const RowScan& block : blocks) {
    if (all.bad_row < 0) all.bad_row = block.bad_row;
    all.total_weight += block.total_weight;
  }
  return all;
}

double sum_rows(const Params& p, const Threads& threads) {
  std::vector<double> blocks(ceil_div(p.n_rows, kBlockRows));
  run_tasks(threads, blocks.size(), [&](int64_t i) {
    const int64_t begin = i * kBlockRows, count = std::min(kBlockRows, p.n_rows - begin);
    blocks[i] = p.dtype == DType::float64
                    ? sum_of(static_cast<const double*>(p.row_loss) + begin, count)
                    : sum_of(static_cast<const float*>(p.row_loss) + begin, count);
  });
  double sum = 0;
  for (double block : blocks) sum += block;
  return sum;
}

}  // namespace fused_xent::cpu
