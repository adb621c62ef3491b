// What is known of targets and losses without logits.
#include <vector>

#include "kernels.h"
#include "launch.h"
#include "tasks.h"

namespace fused_xent::cpu {
namespace {

constexpr int64_t kBlockRows = 8192;  // rows a task; fixed, so that no sum depends on the threads

template <typename Index>
TargetScan scan_rows(const Params& p, const Index* target, int64_t begin, int64_t end) {
  TargetScan scan;
  int64_t n_kept = 0, n_bad = 0;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t y = target[row];
    const bool keep = y != p.ignore_index;
    n_kept += keep;
    n_bad += keep & (static_cast<uint64_t>(y) >= static_cast<uint64_t>(p.vocab_size));
  }
  scan.total_weight = static_cast<double>(n_kept);
  if (n_bad > 0) {
    scan.bad_row = begin;
    const auto is_good = [&](int64_t y) {
      return y == p.ignore_index || (0 <= y && y < p.vocab_size);
    };
    while (is_good(target[scan.bad_row])) ++scan.bad_row;
  } else if (p.weight != nullptr) {
    scan.total_weight = 0;
    for (int64_t row = begin; row < end; ++row) {
      if (target[row] != p.ignore_index) scan.total_weight += class_weight(p, target[row]);
    }
  }
  return scan;
}

// In four sums, which do not wait for each other.
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

}  // namespace

TargetScan scan_targets(const Params& p, const Threads& threads) {
  std::vector<TargetScan> blocks(ceil_div(p.n_rows, kBlockRows));
  run_tasks(threads, blocks.size(), [&](int64_t i) {
    const int64_t end = std::min(p.n_rows, (i + 1) * kBlockRows);
    blocks[i] = with_indices(
        p, [&](const auto* target) { return scan_rows(p, target, i * kBlockRows, end); });
  });
  TargetScan all;
  for (const TargetScan& block : blocks) {
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
