// The rows of a split vocabulary: see ../xent_shards.h. One thread a row, so that a warp reads what
// a rank has sent of 32 rows at once. A row of float32 reads 12 bytes of each rank for a plain
// loss, and 4 of this process; it writes 16.
#include "dispatch.cuh"

namespace fused_xent::cuda {
namespace {

constexpr int kShardThreads = 128;
constexpr int kShardBlocks = 4;  // on a multiprocessor: without it, sm_100 spills a register

template <typename A>
__global__ void __launch_bounds__(kShardThreads, kShardBlocks)
    add_up_rows(const __grid_constant__ Shards shards) {
  const int64_t row = int64_t{blockIdx.x} * kShardThreads + threadIdx.x;
  if (row < shards.n_rows) add_up_row<A>(shards, row);
}

}  // namespace

cudaError_t add_up_shards(const Shards& shards, cudaStream_t stream) {
  if (shards.n_rows == 0) return cudaSuccess;
  const unsigned grid = blocks_for(shards.n_rows, kShardThreads);
  if (shards.acc == DType::float64) {
    add_up_rows<double><<<grid, kShardThreads, 0, stream>>>(shards);
  } else {
    add_up_rows<float><<<grid, kShardThreads, 0, stream>>>(shards);
  }
  return cudaGetLastError();
}

}  // namespace fused_xent::cuda
