// A team: the threads that share a row. It is a part of a warp, a block, or a cluster of blocks.
// The size is known at run time only, and the loops over a row are the same for all.
#pragma once

#include <cooperative_groups.h>

#include <cstdint>

#include "../xent_math.h"
#include "memory.cuh"

namespace fused_xent::cuda {

constexpr int kMaxWarps = 16;
constexpr int kMaxBlocksOfTeam = 8;
constexpr int kWarp = 32;

template <typename Acc>
__device__ __forceinline__ RowStats<Acc> empty_stats() {
  return {kLowest<Acc>, 0, 0, 0};
}

// Merges the stats of `size` neighbouring lanes, which mask names; each lane gets the result.
template <bool kHasSpread, typename Acc>
__device__ __forceinline__ RowStats<Acc> merge_lanes(RowStats<Acc> stats, int size, unsigned mask) {
  Acc max = stats.max;
#pragma unroll
  for (int lane = 1; lane < kWarp; lane *= 2) {
    if (lane == size) break;
    max = fmax(max, __shfl_xor_sync(mask, max, lane));
  }
  shift_stats(stats, max);
#pragma unroll
  for (int lane = 1; lane < kWarp; lane *= 2) {
    if (lane == size) break;
    stats.sum += __shfl_xor_sync(mask, stats.sum, lane);
    if constexpr (kHasSpread) {
      stats.mass += __shfl_xor_sync(mask, stats.mass, lane);
      stats.dot += __shfl_xor_sync(mask, stats.dot, lane);
    }
  }
  return stats;
}

// Shared memory through which warps and blocks exchange their stats. Rows use its halves in turn:
// so one barrier a row is enough, and no thread overwrites what another one still reads.
template <typename Acc>
struct Exchange {
  RowStats<Acc> warps[2][kMaxWarps];
  RowStats<Acc> blocks[2][kMaxBlocksOfTeam];
};

// Its size is a power of two.
class Team {
 public:
  // `size` threads of a block, or of each block of a cluster.
  __device__ explicit Team(int size, bool is_cluster = false)
      : in_block_(size),
        n_blocks_(is_cluster ? static_cast<int>(gridDim.x) : 1),
        block_(is_cluster ? static_cast<int>(blockIdx.x) : 0) {}

  __device__ int size() const { return in_block_ * n_blocks_; }
  // The threads of the team in this thread's warp, and this thread's number among them.
  __device__ int lanes() const { return min(in_block_, kWarp); }
  __device__ int lane() const { return static_cast<int>(threadIdx.x) & (lanes() - 1); }
  __device__ int rank() const {
    return block_ * in_block_ + (static_cast<int>(threadIdx.x) & (in_block_ - 1));
  }
  __device__ bool is_leader() const { return rank() == 0; }
  // Blocks along x share a row: each team, unless it is a cluster, has one of its parts.
  __device__ int part() const { return n_blocks_ > 1 ? 0 : static_cast<int>(blockIdx.x); }
  __device__ int parts() const { return n_blocks_ > 1 ? 1 : static_cast<int>(gridDim.x); }
  // Teams along y, and this team's number among them.
  __device__ int64_t count() const { return of_blocks(gridDim.y, 0); }
  __device__ int64_t index() const { return of_blocks(blockIdx.y, threadIdx.x); }

  // Returns the merged stats of all threads to each of them. A barrier: reads before it come before
  // writes after it.
  template <bool kHasSpread, typename Acc>
  __device__ __forceinline__ RowStats<Acc> merge(RowStats<Acc> stats, Exchange<Acc>& exchange) {
    if (in_block_ <= kWarp) {
      const unsigned first = threadIdx.x % kWarp & ~(in_block_ - 1u);
      const unsigned mask = (in_block_ == kWarp ? ~0u : (1u << in_block_) - 1) << first;
      stats = merge_lanes<kHasSpread>(stats, in_block_, mask);
      __syncwarp(mask);
      if (n_blocks_ == 1) return stats;
    } else {
      stats = merge_lanes<kHasSpread>(stats, kWarp, ~0u);
      const int lane = threadIdx.x % kWarp, n_warps = in_block_ / kWarp;
      if (lane == 0) exchange.warps[turn_][threadIdx.x / kWarp] = stats;
      __syncthreads();
      stats = lane < n_warps ? exchange.warps[turn_][lane] : empty_stats<Acc>();
      stats = merge_lanes<kHasSpread>(stats, kWarp, ~0u);
    }
    if (n_blocks_ > 1) stats = merge_blocks<kHasSpread>(stats, exchange);
    turn_ ^= 1;
    return stats;
  }

 private:
  template <bool kHasSpread, typename Acc>
  __device__ __forceinline__ RowStats<Acc> merge_blocks(RowStats<Acc> stats,
                                                        Exchange<Acc>& exchange) {
#if __CUDA_ARCH__ >= 900
    const auto cluster = cooperative_groups::this_cluster();
    const int lane = threadIdx.x % kWarp;
    if (static_cast<int>(threadIdx.x) < n_blocks_) {
      *cluster.map_shared_rank(&exchange.blocks[turn_][block_], threadIdx.x) = stats;
    }
    // The other warps have nothing to release: merge() has had a barrier of the block since they
    // read the exchange, so the first warp's release covers that.
    if (threadIdx.x < kWarp) {
      __cluster_barrier_arrive();
    } else {
      __cluster_barrier_arrive_relaxed();
    }
    __cluster_barrier_wait();
    stats = lane < n_blocks_ ? exchange.blocks[turn_][lane] : empty_stats<Acc>();
    stats = merge_lanes<kHasSpread>(stats, kWarp, ~0u);
#endif
    return stats;
  }

  __device__ int64_t of_blocks(unsigned blocks, unsigned threads) const {
    return (int64_t{blocks} * blockDim.x + threads) >> (31 - __clz(in_block_));
  }

  int in_block_, n_blocks_, block_;
  int turn_ = 0;
};

}  // namespace fused_xent::cuda
