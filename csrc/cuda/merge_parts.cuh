// The second kernel of forward where several blocks share a row: a thread for each row merges the
// stats of its parts.
#pragma once

#include "dispatch.cuh"
#include "labels.cuh"
#include "transform.cuh"

namespace fused_xent::cuda {

constexpr int kMergeThreads = 256;

template <typename T, typename Stats>
__global__ void __launch_bounds__(kMergeThreads)
    merge_parts(const __grid_constant__ Arguments a, int parts, const Stats* partials) {
  const int64_t n_threads = int64_t{gridDim.x} * blockDim.x;
  for (int64_t row = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; row < a.n_rows;
       row += n_threads) {
    const Target target = read_target(a, row);
    if (!target.is_read()) continue;  // written by the row's first part
    const T* logits = row_of<const T>(a.logits, a.logits_layout, row);
    const Acc<T> x = target.index < 0 ? Acc<T>(0) : to_acc(logits[target.index]);
    Stats stats = partials[row * parts];
    for (int part = 1; part < parts; ++part) merge_stats(stats, partials[row * parts + part]);
    const Acc<T> z = transformed(transform_of<Acc<T>>(a), x);
    const auto results = results_of_row(a, row, target.index, z, stats);
    if constexpr (std::is_same_v<Stats, RowStats<Acc<T>>>) {
      write_results(a, row, results);
    } else {
      write_results(a, row, results, stats.argmax);
    }
  }
}

// Stats: RowStats or FullStats, what the first kernel has left in the workspace.
template <template <typename> typename Stats>
cudaError_t launch_merge_parts(const Arguments& a, const Plan& plan, const void* workspace,
                               cudaStream_t stream) {
  return with_dtype(a.dtype, [&]<typename T>(Type<T>) {
    const unsigned grid = blocks_for(a.n_rows, kMergeThreads);
    merge_parts<T><<<grid, kMergeThreads, 0, stream>>>(
        a, plan.parts, static_cast<const Stats<Acc<T>>*>(workspace));
    return cudaGetLastError();
  });
}

}  // namespace fused_xent::cuda
